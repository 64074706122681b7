"""Which files of a version a device needs, and how they come here verified."""

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from edge_agent.errors import StalledError
from edge_agent.updates.blobs import BlobStore
from edge_agent.updates.slots import Slots
from models.contract.manifest import GRAPH_NAMES, MANIFEST_NAME, FileEntry, ModelManifest, parse_manifest
from models.contract.messages import EventKind
from models.contract.offer import build_graph_target

FindTarget: TypeAlias = Callable[[str], FileEntry | None]
OnEvent: TypeAlias = Callable[[EventKind, str, int | None], None]


def list_needed(manifest: ModelManifest, *, trains: bool) -> list[str]:
    """Return the names of the files a device needs, with or without those it trains with."""
    graphs = manifest.training.graph_names if trains and manifest.training is not None else ()
    return [manifest.inference_name, *graphs]


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
        missing = [
            entry for name, entry in needed.items() if await asyncio.to_thread(self._slots.find, entry, name) is None
        ]
        await self._fetch_files(missing, release, manifest.version)
        return data

    async def _fetch_manifest(self, release: FileEntry) -> bytes:
        path = self._slots.find(release, MANIFEST_NAME)
        if path is not None:
            return path.read_bytes()
        await self._blobs.fetch(release)
        return b"".join(self._blobs.read(release))

    async def _fetch_files(self, missing: list[FileEntry], release: FileEntry, version: int) -> None:
        what = f"{len(missing)} files, {sum(entry.size_bytes for entry in missing)} bytes"
        self._on_event(EventKind.DOWNLOADING, what, version)
        self._blobs.keep_only([release.digest, *(entry.digest for entry in missing)])
        for entry in missing:
            await self._blobs.fetch(entry)
        self._on_event(EventKind.DOWNLOADED, what, version)
        self._on_event(EventKind.VERIFIED, f"manifest {release.digest[:12]}… and its files", version)
