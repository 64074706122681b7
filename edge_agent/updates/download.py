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
from edge_agent.updates.slots import Slots
from models.contract.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    FileEntry,
    ModelManifest,
    parse_manifest,
)
from models.contract.messages import EventKind
from models.contract.offer import CHUNK_MAX_BYTES, build_graph_target
from models.tensors.delta import apply_delta

FindTarget: TypeAlias = Callable[[str], FileEntry | None]
OnEvent: TypeAlias = Callable[[EventKind, str, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shortcut:
    """A delta, and the weights in a slot that it is added to."""

    delta: FileEntry
    base_path: Path


def list_needed(manifest: ModelManifest, *, trains: bool) -> list[str]:
    """Return the names of the files a device needs, with or without those it trains with."""
    training = manifest.training.file_names if trains and manifest.training is not None else ()
    return [*manifest.serving_names, *training]


class Downloader:
    """Fetches what no slot has of a version."""

    def __init__(self, *, model: str, trains: bool, blobs: BlobStore, slots: Slots, on_event: OnEvent) -> None:
        self._model, self._trains, self._blobs, self._slots, self._on_event = model, trains, blobs, slots, on_event

    async def fetch(self, release: FileEntry, find_target: FindTarget) -> bytes:
        """Return the manifest that `release` is, once every needed file is in a slot or in the blob store.

        Raises:
            TransientError: A file did not come whole.
            StalledError: It is no version for this device, or a graph is not signed by the offline role.
            MalformedError: It is no manifest.
        """
        data = await self._fetch_manifest(release)
        manifest = parse_manifest(data)
        if manifest.model != self._model:
            raise StalledError(f"the release is a version of {manifest.model!r}, this device serves {self._model!r}")
        needed = {name: manifest.files[name] for name in list_needed(manifest, trains=self._trains)}
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
        if WEIGHTS_NAME in missing:
            for delta in manifest.deltas:
                base = FileEntry(digest=delta.base, size_bytes=missing[WEIGHTS_NAME].size_bytes)
                if (path := self._slots.find(base, WEIGHTS_NAME)) is not None:
                    return missing, _Shortcut(delta=delta.file, base_path=path)
        return missing, None

    async def _fetch_files(
        self, missing: dict[str, FileEntry], shortcut: _Shortcut | None, release: FileEntry, version: int
    ) -> None:
        fetched = missing if shortcut is None else missing | {WEIGHTS_NAME: shortcut.delta}
        what = f"{len(fetched)} files, {sum(entry.size_bytes for entry in fetched.values())} bytes"
        self._on_event(EventKind.DOWNLOADING, what, version)
        self._blobs.keep_only(entry.digest for entry in (release, *missing.values(), *fetched.values()))
        for name, entry in missing.items():
            if name == WEIGHTS_NAME and shortcut is not None:
                try:
                    await self._take_shortcut(shortcut, entry)
                    continue
                except (TransientError, OSError, ValueError) as error:
                    what = f"{len(missing)} files, {sum(entry.size_bytes for entry in missing.values())} bytes"
                    self._on_event(EventKind.DOWNLOADING, f"{what}, without the delta: {error}", version)
            await self._blobs.fetch(entry)
        self._on_event(EventKind.DOWNLOADED, what, version)
        self._on_event(EventKind.VERIFIED, f"manifest {release.digest[:12]}… and its files", version)

    async def _take_shortcut(self, shortcut: _Shortcut, weights: FileEntry) -> None:
        """Make `weights` of those in a slot; raises TransientError, OSError or ValueError if that fails."""
        await self._blobs.fetch(shortcut.delta)
        delta = b"".join(self._blobs.read(shortcut.delta))
        rebuilt = _rebuild(shortcut.base_path, delta, weights.size_bytes)
        await asyncio.to_thread(self._blobs.keep, weights, rebuilt)


def _rebuild(base_path: Path, delta: bytes, size_bytes: int) -> Iterator[bytes]:
    with base_path.open("rb") as base:
        yield from apply_delta(base, delta, size_bytes=size_bytes, block_bytes=CHUNK_MAX_BYTES)
