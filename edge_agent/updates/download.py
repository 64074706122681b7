"""Which files of a version a device needs, and how they come here verified.

Weights come as a delta to those that a slot holds, if the version has one for them, and whole if that fails.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edge_agent.errors import StalledError, TransientError
from edge_agent.updates.blobs import BlobStore
from edge_agent.updates.following import check_manifest
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.slots import Slots
from models.contract.manifest import (
    GOLDEN_NAME,
    GRAPH_NAMES,
    MANIFEST_NAME,
    FileEntry,
    ModelManifest,
    parse_manifest,
)
from models.contract.messages import EventKind
from models.contract.offer import CHUNK_MAX_BYTES, build_graph_target
from models.tensors.delta import apply_delta

FindTarget: TypeAlias = Callable[[str], FileEntry | None]
OnEvent: TypeAlias = Callable[[EventKind, str, int | None], None]

_LONG_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shortcut:
    """A delta, what the version calls the file that it leads to, and the one in a slot that it is added to."""

    name: str
    delta: FileEntry
    base_path: Path


def list_needed(manifest: ModelManifest, *, trains: bool) -> list[str]:
    """Return the names of the files a device needs, with or without those it trains with."""
    training = manifest.training.file_names if trains and manifest.training is not None else ()
    golden = () if manifest.golden is None else (GOLDEN_NAME,)
    return [*manifest.serving_names, *training, *golden]


class Downloader:
    """Fetches what no slot has of a version."""

    def __init__(self, settings: UpdaterSettings, *, blobs: BlobStore, slots: Slots, on_event: OnEvent) -> None:
        self._settings, self._blobs, self._slots, self._on_event = settings, blobs, slots, on_event

    async def fetch(self, release: FileEntry, find_target: FindTarget) -> bytes:
        """Return the manifest that `release` is, once every needed file is in a slot or in the blob store.

        Raises:
            TransientError: A file did not come whole.
            UnfitError: It is no version for this device.
            StalledError: A graph is not signed by the offline role.
            MalformedError: It is no manifest.
        """
        data = await self._fetch_manifest(release)
        manifest = parse_manifest(data)
        check_manifest(manifest, model=self._settings.model, traits=self._settings.traits)
        needed = {name: manifest.all_files[name] for name in list_needed(manifest, trains=self._settings.trains)}
        for name in needed.keys() & set(GRAPH_NAMES):
            if find_target(build_graph_target(needed[name].digest, name)) != needed[name]:
                raise StalledError(f"{name} of version {manifest.version} is not signed by the offline role")
        missing, shortcut = await asyncio.to_thread(self._look, manifest, needed)
        await self._fetch_files(missing, shortcut, release, manifest.version)
        return data

    async def _fetch_manifest(self, release: FileEntry) -> bytes:
        path = self._slots.find(release, MANIFEST_NAME)
        if path is not None:
            return path.read_bytes()
        await self._blobs.fetch(release)
        return b"".join(self._blobs.read(release))

    def _look(
        self, manifest: ModelManifest, needed: dict[str, FileEntry]
    ) -> tuple[dict[str, FileEntry], _Shortcut | None]:
        """Return what no slot holds, by name, and a shorter way to the weights if they are among it."""
        missing = {name: entry for name, entry in needed.items() if self._slots.find(entry, name) is None}
        name = manifest.weights_name
        if name in missing:
            for delta in manifest.deltas:
                base = FileEntry(digest=delta.base, size_bytes=missing[name].size_bytes)
                if (path := self._slots.find(base, name)) is not None:
                    return missing, _Shortcut(name=name, delta=delta.file, base_path=path)
        return missing, None

    async def _fetch_files(
        self, missing: dict[str, FileEntry], shortcut: _Shortcut | None, release: FileEntry, version: int
    ) -> None:
        fetched = missing if shortcut is None else missing | {shortcut.name: shortcut.delta}
        what, progress = self._announce(fetched, version)
        self._blobs.keep_only(entry.digest for entry in (release, *missing.values(), *fetched.values()))
        for name, entry in missing.items():
            if shortcut is not None and name == shortcut.name:
                try:
                    await self._take_shortcut(shortcut, entry, progress)
                    continue
                except (TransientError, OSError, ValueError) as error:
                    what, progress = self._announce(missing, version, f", without the delta: {error}")
            await self._blobs.fetch(entry, progress.add)
        self._on_event(EventKind.DOWNLOADED, what, version)
        self._on_event(EventKind.VERIFIED, f"manifest {release.digest[:12]}… and its files", version)

    def _announce(self, files: dict[str, FileEntry], version: int, why: str = "") -> tuple[str, "_Progress"]:
        """Say what is about to be fetched; return it in words, and what counts it."""
        total_bytes = sum(entry.size_bytes for entry in files.values())
        what = f"{len(files)} files, {total_bytes} bytes"
        self._on_event(EventKind.DOWNLOADING, f"{what}{why}", version)

        def say(share: int) -> None:
            self._on_event(EventKind.DOWNLOADING, f"{share} % of {what}", version)

        return what, _Progress(total_bytes, say)

    async def _take_shortcut(self, shortcut: _Shortcut, weights: FileEntry, progress: "_Progress") -> None:
        """Make `weights` of those in a slot; raises TransientError, OSError or ValueError if that fails."""
        await self._blobs.fetch(shortcut.delta, progress.add)
        delta = b"".join(self._blobs.read(shortcut.delta))
        rebuilt = _rebuild(shortcut.base_path, delta, weights.size_bytes)
        await asyncio.to_thread(self._blobs.keep, weights, rebuilt)


class _Progress:
    """Says how much of a long download is here, at each quarter: a short one has come before anybody reads it."""

    def __init__(self, total_bytes: int, say: Callable[[int], None]) -> None:
        self._total_bytes, self._say = total_bytes, say
        self._done_bytes = self._said = 0

    def add(self, size_bytes: int) -> None:
        """Count `size_bytes` more."""
        self._done_bytes += size_bytes
        quarters = min(4 * self._done_bytes // self._total_bytes, 3)  # of the last one DOWNLOADED tells
        if quarters > self._said and self._total_bytes >= _LONG_BYTES:
            self._said = quarters
            self._say(25 * quarters)


def _rebuild(base_path: Path, delta: bytes, size_bytes: int) -> Iterator[bytes]:
    with base_path.open("rb") as base:
        yield from apply_delta(base, delta, size_bytes=size_bytes, block_bytes=CHUNK_MAX_BYTES)
