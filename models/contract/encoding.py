"""Canonical JSON, digests and typed parsing: how every document becomes bytes and back."""

import hashlib
import json
from typing import Any, TypeVar

import msgspec

from models.contract.errors import MalformedError

_Document = TypeVar("_Document")

DOCUMENT_MAX_BYTES = 64 * 1024  # ten times the largest we write; the offer has its own bound


def build_canonical(document: Any) -> bytes:
    """Return `document` as canonical JSON: sorted keys, no blanks, UTF-8, decimals as strings.

    Raises:
        ValueError: The document holds a float, which has no canonical form.
    """
    plain = msgspec.to_builtins(document)
    _check_no_floats(plain)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def build_json(document: Any) -> bytes:
    """Return `document` as compact JSON; floats allowed, for documents that nobody signs."""
    return msgspec.json.encode(document)


def parse_json(data: bytes, kind: type[_Document], *, max_bytes: int = DOCUMENT_MAX_BYTES) -> _Document:
    """Return the document of type `kind` in `data`; unknown fields are ignored, so that fields can be added.

    Raises:
        MalformedError: Not JSON, longer than `max_bytes`, or not a valid `kind`.
    """
    if len(data) > max_bytes:
        raise MalformedError(f"{kind.__name__}: {len(data)} bytes, at most {max_bytes} are read")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError) as error:
        raise MalformedError(f"{kind.__name__}: {error}") from error


def build_digest(data: bytes) -> str:
    """Return the SHA-256 of `data` as lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def check_digest_text(digest: str) -> None:
    """Raise ValueError unless `digest` is 64 lower-case hex digits."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"{digest!r:.80} is not a SHA-256 in hex")


def _check_no_floats(value: Any) -> None:
    if isinstance(value, float):
        raise ValueError(f"{value!r} is a float: signed documents hold integers or decimal strings")
    if isinstance(value, dict):
        for item in value.values():
            _check_no_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_no_floats(item)
