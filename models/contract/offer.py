"""The release offer: every TUF metadata file a client may need, in one compressed retained message.

The signatures inside are what is trusted; this envelope is not. It is bounded while decompressing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import zstandard

from models.contract.encoding import build_json, check_digest_text, parse_json
from models.contract.errors import MalformedError

OFFER_MAX_BYTES = 256 * 1024  # decompressed; 50 targets and 5 root rotations take 25 kB compressed
CHUNK_MAX_BYTES = 64 * 1024  # of an artifact, in one message
ZSTD_LEVEL = 19
_FILE_NAME = re.compile(r"([1-9][0-9]{0,8}\.)?[A-Za-z0-9_.~%-]{1,64}\.json")  # a role's name, quoted as in a URL

# Paths of TUF targets. Role "releases" is online; role "graphs" is offline and holds the clipping.
ROLE_RELEASES = "releases"
ROLE_GRAPHS = "graphs"
COORDINATOR_KEY_TARGET = "keys/coordinator.pem"

SIGNED_AT_FIELD = "signed_at"  # of the timestamp: devices take it for the least that the time can be
_SIGNED_AT_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    schema_version: Literal[1] = 1
    metadata: dict[str, str]


def build_release_target(model: str, alias: str) -> str:
    """Return the target path of the manifest that `alias` ("champion") of `model` stands for."""
    return f"releases/{model}/{alias}/manifest.json"


def build_graph_target(digest: str, name: str) -> str:
    """Return the target path of a graph that the offline role has signed."""
    check_digest_text(digest)
    return f"graphs/{digest}/{name}"


def build_signed_at(now: datetime) -> str:
    """Return what a timestamp that is signed at `now`, aware, says in `SIGNED_AT_FIELD`."""
    return now.astimezone(UTC).strftime(_SIGNED_AT_FORMAT)


def parse_signed_at(fields: Mapping[str, object]) -> datetime | None:
    """Return when a timestamp with the further fields `fields` was signed, aware; None if it does not say."""
    try:
        return datetime.strptime(str(fields.get(SIGNED_AT_FIELD)), _SIGNED_AT_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        return None


def build_offer(metadata: Mapping[str, bytes]) -> bytes:
    """Return the offer that holds `metadata`, TUF files by name.

    Raises:
        ValueError: It would be longer than devices read.
    """
    document = build_json(_Offer(metadata={name: data.decode() for name, data in sorted(metadata.items())}))
    if len(document) > OFFER_MAX_BYTES:
        raise ValueError(f"the offer has {len(document)} bytes, devices read at most {OFFER_MAX_BYTES}")
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(document)


def parse_offer(data: bytes) -> dict[str, bytes]:
    """Return the TUF files in an offer, by name; raises MalformedError."""
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 23)
        with decompressor.stream_reader(data) as reader:
            document = reader.read(OFFER_MAX_BYTES + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise MalformedError(f"offer: {error}") from error
    offer = parse_json(document, _Offer, max_bytes=OFFER_MAX_BYTES)
    for name in offer.metadata:
        if not _FILE_NAME.fullmatch(name):
            raise MalformedError(f"offer: {name!r:.80} is no name of a TUF metadata file")
    return {name: text.encode() for name, text in offer.metadata.items()}


def split_chunks(data: bytes) -> list[bytes]:
    """Return `data` in chunks of `CHUNK_MAX_BYTES`, the last one shorter; at least one."""
    return [data[start : start + CHUNK_MAX_BYTES] for start in range(0, max(len(data), 1), CHUNK_MAX_BYTES)]


def count_chunks(size_bytes: int) -> int:
    """Return into how many chunks an artifact of `size_bytes` is split."""
    return max(1, -(-size_bytes // CHUNK_MAX_BYTES))
