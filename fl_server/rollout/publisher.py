"""What the broker must hold for devices to update: the offer, and the blobs it leads to.

Blobs go first and the offer last, so that it never leads to what is still to come; what only older offers led to
is cleared after it. The order on one connection is the order in which a device sees them.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fl_server.errors import ServerError
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.files import save_atomically
from models.contract.manifest import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    PARAMETERS_NAME,
    ModelManifest,
    parse_manifest,
)
from models.contract.offer import count_chunks, split_chunks
from models.contract.topics import build_blob_topic, build_offer_topic

logger = logging.getLogger(__name__)

OFFER_CONTENT_TYPE = "application/zstd"
BLOB_CONTENT_TYPE = "application/octet-stream"
_RECORD_MAX_BYTES = 4 * 1024 * 1024


class Publish(Protocol):
    """Publishes one message and returns once the broker has it."""

    async def __call__(self, topic: str, payload: bytes, *, retain: bool, content_type: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What leads from what the broker holds to what it must hold.

    Attributes:
        blobs: Digests of the blobs to publish, before the offer.
        clear: Topics to clear, after the offer.
    """

    blobs: tuple[str, ...]
    clear: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """Sizes of the blobs that the broker may hold, by digest."""

    blobs: dict[str, int]


def plan_publication(fleet: str, *, held: Iterable[str], recorded: Mapping[str, int], live: Iterable[str]) -> Plan:
    """Return what to publish and what to clear.

    Args:
        fleet: Whose topics.
        held: Digests of blobs that the broker surely holds.
        recorded: Sizes of all blobs it may hold, by digest.
        live: Digests of the blobs it must hold.
    """
    wanted, sure = set(live), set(held)
    stale = {digest: size for digest, size in recorded.items() if digest not in wanted}
    return Plan(
        blobs=tuple(sorted(wanted - sure)),
        clear=tuple(
            build_blob_topic(fleet, digest, index)
            for digest, size in sorted(stale.items())
            for index in range(count_chunks(size))
        ),
    )


def list_blobs(version_dir: Path) -> dict[str, Path]:
    """Return what devices fetch of the version in `version_dir`, by digest; never the float parameters."""
    manifest_path = version_dir / MANIFEST_NAME
    data = manifest_path.read_bytes()
    files = parse_manifest(data).all_files
    blobs = {entry.digest: version_dir / name for name, entry in files.items() if name != PARAMETERS_NAME}
    return blobs | {build_digest(data): manifest_path}


def count_pushed_bytes(manifest: bytes, previous: ModelManifest | None) -> int:
    """Return how many bytes of blobs a device must fetch for `manifest` if it holds `previous`."""
    known = set() if previous is None else {entry.digest for entry in previous.files.values()}
    parsed = parse_manifest(manifest)
    new = {name: entry for name, entry in parsed.files.items() if name != PARAMETERS_NAME and entry.digest not in known}
    for delta in parsed.deltas:
        if parsed.weights_name in new and delta.base in known:
            new[parsed.weights_name] = delta.file
    if parsed.golden is not None:
        new[GOLDEN_NAME] = parsed.golden
    return len(manifest) + sum({entry.digest: entry.size_bytes for entry in new.values()}.values())


class Publisher:
    """Keeps one fleet's retained messages; `record_path` survives a restart so that nothing stays for ever."""

    def __init__(self, *, fleet: str, record_path: Path, publish: Publish) -> None:
        self._fleet, self._record_path, self._publish = fleet, record_path, publish
        self._held: set[str] = set()  # the broker is not believed to hold what another process published
        self._offer: bytes | None = None
        self._recorded = self._load_record()

    async def publish(self, offer: bytes, blobs: Mapping[str, Path | bytes], *, clears: bool = True) -> None:
        """Make the broker hold `offer` and `blobs`, by digest; what it holds already is not sent again.

        A blob that is not what its digest says is logged and left out: without a new offer, all others would expire.

        Args:
            offer: What leads to the blobs.
            blobs: By digest.
            clears: `blobs` are all there are: the broker need hold no others.

        Raises:
            ServerError: The broker does not take a message.
        """
        plan = plan_publication(self._fleet, held=self._held, recorded=self._recorded, live=blobs)
        for digest in plan.blobs:
            try:
                chunks = split_chunks(load_blob(digest, blobs[digest]))
            except (ServerError, OSError) as error:
                logger.error("not published: %s", error)  # noqa: TRY400
                continue
            self._record(
                self._recorded | {digest: sum(map(len, chunks))}
            )  # first: a blob that nobody knows of would never be cleared
            for index, chunk in enumerate(chunks):
                topic = build_blob_topic(self._fleet, digest, index)
                await self._publish(topic, chunk, retain=True, content_type=BLOB_CONTENT_TYPE)
            self._held.add(digest)
        if offer != self._offer:
            topic = build_offer_topic(self._fleet)
            await self._publish(topic, offer, retain=True, content_type=OFFER_CONTENT_TYPE)
            self._offer = offer
        if clears:
            for topic in plan.clear:
                await self._publish(topic, b"", retain=True, content_type=BLOB_CONTENT_TYPE)
            self._held &= set(blobs)
            self._record({digest: size for digest, size in self._recorded.items() if digest in blobs})

    async def republish(self, offer: bytes, blobs: Mapping[str, Path | bytes], *, clears: bool = True) -> None:
        """Send everything again: to a broker that restarted, and may have lost it."""
        self._held.clear()
        self._offer = None
        await self.publish(offer, blobs, clears=clears)

    def _load_record(self) -> dict[str, int]:
        try:
            data = self._record_path.read_bytes()
        except FileNotFoundError:
            return {}
        return parse_json(data, _Record, max_bytes=_RECORD_MAX_BYTES).blobs

    def _record(self, blobs: dict[str, int]) -> None:
        if blobs != self._recorded:
            save_atomically(self._record_path, build_json(_Record(blobs=blobs)))
            self._recorded = blobs


def load_blob(digest: str, source: Path | bytes) -> bytes:
    """Return the bytes in `source`; raises ServerError if they are not what `digest` says, OSError if unreadable."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    if build_digest(data) != digest:
        raise ServerError(f"{source!s:.200} is not what its digest {digest[:12]}… says; restore it")
    return data
