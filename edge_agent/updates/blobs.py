"""Fetches an artifact by digest, chunk by chunk, from retained messages.

Each chunk is kept on disk as it arrives, so that an interrupted fetch resumes with what is missing:

    downloads/{sha256}/{index}
"""

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

from edge_agent.errors import TransientError
from models.contract.encoding import build_digest
from models.contract.manifest import FileEntry
from models.contract.offer import CHUNK_MAX_BYTES, count_chunks
from models.contract.topics import build_blob_topic

OnBytes: TypeAlias = Callable[[int], None]

CHUNK_TIMEOUT_S = 10.0  # a retained message comes at once or not at all


class RetainedReader(Protocol):
    """Reads one retained message."""

    async def read(self, topic: str, timeout_s: float) -> bytes | None:
        """Subscribe to `topic`, return what is retained there and unsubscribe; None if nothing came in time."""
        ...


class BlobStore:
    """Artifacts that were fetched or are being fetched, under one directory."""

    def __init__(self, directory: Path, *, reader: RetainedReader, fleet: str, window: int = 4) -> None:
        self._dir, self._reader, self._fleet, self._window = directory, reader, fleet, window

    async def fetch(self, entry: FileEntry, on_bytes: OnBytes = lambda _: None) -> None:
        """Fetch what is missing of `entry` and verify the whole; the caller sets the deadline.

        Args:
            entry: What to fetch.
            on_bytes: Is told of so many bytes more that are here, also of those that were.

        Raises:
            TransientError: A chunk did not come or has a wrong length, the digest does not fit, or the disk is full.
        """
        with self._keeping(entry):
            (self._dir / entry.digest).mkdir(parents=True, exist_ok=True)
            missing = [index for index in range(count_chunks(entry.size_bytes)) if not self._has_chunk(entry, index)]
        on_bytes(entry.size_bytes - sum(_get_chunk_bytes(entry, index) for index in missing))
        await self._fetch_chunks(entry, missing, on_bytes)
        with self._keeping(entry):
            found = await asyncio.to_thread(self._hash, entry)
        if found != entry.digest:
            self._discard(entry.digest)  # which chunk it was cannot be known
            raise TransientError(f"blob {entry.digest[:12]}… arrived with digest {found[:12]}… and was discarded")

    def keep(self, entry: FileEntry, chunks: Iterable[bytes]) -> None:
        """Keep an artifact that was made here, given in its chunks, as if it had been fetched; blocks.

        Raises:
            TransientError: It is not what `entry` says, and nothing was kept, or the disk is full.
        """
        made = list(chunks)  # whole, before it takes the place of what was fetched
        if (found := build_digest(b"".join(made))) != entry.digest:
            raise TransientError(f"blob {entry.digest[:12]}… was made with digest {found[:12]}…")
        with self._keeping(entry):
            (self._dir / entry.digest).mkdir(parents=True, exist_ok=True)
            for index, chunk in enumerate(made):
                self._get_chunk_path(entry, index).write_bytes(chunk)

    def read(self, entry: FileEntry) -> Iterator[bytes]:
        """Yield the chunks of an artifact that was fetched."""
        for index in range(count_chunks(entry.size_bytes)):
            yield self._get_chunk_path(entry, index).read_bytes()

    def keep_only(self, digests: Iterable[str]) -> None:
        """Discard every artifact but these."""
        wanted = set(digests)
        if self._dir.exists():
            for path in self._dir.iterdir():
                if path.name not in wanted:
                    self._discard(path.name)

    async def _fetch_chunks(self, entry: FileEntry, indices: list[int], on_bytes: OnBytes) -> None:
        remaining = iter(indices)

        async def fetch_some() -> None:
            for index in remaining:
                await self._fetch_chunk(entry, index)
                on_bytes(_get_chunk_bytes(entry, index))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._window, len(indices))):
                    group.create_task(fetch_some())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch_chunk(self, entry: FileEntry, index: int) -> None:
        where = f"chunk {index} of {count_chunks(entry.size_bytes)} of blob {entry.digest[:12]}…"
        data = await self._reader.read(build_blob_topic(self._fleet, entry.digest, index), CHUNK_TIMEOUT_S)
        if data is None:
            raise TransientError(f"{where} did not come within {CHUNK_TIMEOUT_S:.0f} s")
        if len(data) != (expected := _get_chunk_bytes(entry, index)):
            raise TransientError(f"{where} has {len(data)} bytes, expected {expected}")
        with self._keeping(entry):
            self._get_chunk_path(entry, index).write_bytes(data)

    @contextmanager
    def _keeping(self, entry: FileEntry) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard(entry.digest)  # a full disk hurts the services beside us more than a second fetch
            raise TransientError(f"cannot keep blob {entry.digest[:12]}…: {error.strerror}") from error

    def _has_chunk(self, entry: FileEntry, index: int) -> bool:
        try:
            return self._get_chunk_path(entry, index).stat().st_size == _get_chunk_bytes(entry, index)
        except FileNotFoundError:
            return False

    def _hash(self, entry: FileEntry) -> str:
        sha256 = hashlib.sha256()
        for chunk in self.read(entry):
            sha256.update(chunk)
        return sha256.hexdigest()

    def _get_chunk_path(self, entry: FileEntry, index: int) -> Path:
        return self._dir / entry.digest / str(index)

    def _discard(self, digest: str) -> None:
        shutil.rmtree(self._dir / digest, ignore_errors=True)


def _get_chunk_bytes(entry: FileEntry, index: int) -> int:
    return min(CHUNK_MAX_BYTES, entry.size_bytes - index * CHUNK_MAX_BYTES)
