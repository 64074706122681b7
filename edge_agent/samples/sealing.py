r"""How a sample lies on the disk: one sealed record that tells nothing but its length, its age and its model.

    nonce (12) | AES-256-GCM of: x dtype, x shape, y dtype, y shape \n fields as JSON \n bytes of x | bytes of y | tag (16)

Row, model and age are associated data: a record that is moved to another row, or made younger, does not open.
Nonces are random. NIST SP 800-38D allows 2^32 of them a key, at which two are alike with a chance of 2^-33; rows are
numbered once and for all, so that their number says when that is.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_agent.errors import RequestError, StalledError
from edge_agent.samples.cipher import NONCE_BYTES, TagError, open_cipher
from models.tensors.spec import DTYPES, TensorSpec

Array: TypeAlias = npt.NDArray[Any]
Sample: TypeAlias = tuple[Array, Array]

RECORDS_MAX = 1 << 32
_CHECK = b"edge-fl samples key check"


class SealError(StalledError):
    """Samples cannot be sealed or opened: the key is another one, is lost, or a record was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What of a row is not sealed."""

    row: int
    model: str
    kept_s: int

    def build_associated(self) -> bytes:
        return b"edge-fl sample 1\0%d\0%d\0%s" % (self.row, self.kept_s, self.model.encode())


@dataclass(frozen=True, slots=True)
class Opened:
    """A record's content; `data` is x and y, whose dtypes and shapes are `layout`."""

    layout: bytes
    fields: bytes
    data: bytes

    def parse_fields(self) -> dict[str, str]:
        """Return the row's values by which its owner may ask to have it forgotten."""
        fields: dict[str, str] = json.loads(self.fields) if self.fields else {}
        return fields

    def parse_sample(self) -> Sample:
        x, y = parse_layout(self.layout).split([self.data])
        return x[0], y[0]


class Sealer:
    """Seals and opens records under one key; may be used from several threads."""

    def __init__(self, key: bytes) -> None:
        self._cipher = open_cipher(key)

    def seal(self, record: Record, sample: Sample, fields: Mapping[str, str]) -> bytes:
        """Return `sample` and `fields`, sealed; raises RequestError for a dtype that no model takes."""
        if record.row >= RECORDS_MAX:
            raise RequestError(f"this key has sealed {RECORDS_MAX} samples: forget all of them for another", status=507)
        text = json.dumps(dict(fields)).encode() if fields else b""
        data = b"\n".join((build_layout(sample), text, sample[0].tobytes() + sample[1].tobytes()))
        return self._seal(data, record.build_associated())

    def open(self, record: Record, sealed: bytes) -> Opened:
        """Return what was sealed; raises SealError."""
        try:
            return Opened(*self._open(sealed, record.build_associated()).split(b"\n", 2))
        except TagError as error:
            raise SealError(f"sample {record.row} does not open: it was changed, or sealed with another key") from error

    def build_check(self) -> bytes:
        """Return what `is_key_of` knows this key by."""
        return self._seal(b"", _CHECK)

    def is_key_of(self, check: bytes) -> bool:
        try:
            self._open(check, _CHECK)
        except TagError:
            return False
        return True

    def _seal(self, data: bytes, associated: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, associated)

    def _open(self, sealed: bytes, associated: bytes) -> bytes:
        if len(sealed) < NONCE_BYTES:
            raise TagError
        return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)


def build_layout(sample: Sample) -> bytes:
    """Return dtypes and shapes of `sample`; raises RequestError for a dtype that no model takes."""
    for name, array in zip("xy", sample, strict=True):
        if array.dtype.name not in DTYPES:
            raise RequestError(f"{name} is {array.dtype.name}, expected one of {', '.join(DTYPES)}")
    return ";".join(f"{array.dtype.name}:{'x'.join(map(str, array.shape))}" for array in sample).encode()


@dataclass(frozen=True, slots=True)
class Layout:
    """Dtypes and shapes of x and y."""

    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def split(self, data: Sequence[bytes]) -> tuple[Array, Array]:
        """Return x and y of samples of this layout, stacked."""
        x_bytes = np.dtype(self.dtypes[0]).itemsize * math.prod(self.shapes[0])
        rows = np.frombuffer(b"".join(data), np.uint8).reshape(len(data), -1)
        x, y = rows[:, :x_bytes], rows[:, x_bytes:]
        return self._view(x, 0), self._view(y, 1)

    def load(self, data: Sequence[bytes], x_spec: TensorSpec, y_spec: TensorSpec) -> tuple[Array, Array, Array]:
        """Return x and y in the dtypes of the specs, and which rows survived the change."""
        x, y = self.split(data)
        converted_x, x_fits = _convert(x, x_spec)
        converted_y, y_fits = _convert(y, y_spec)
        return converted_x, converted_y, x_fits & y_fits

    def _view(self, rows: Array, index: int) -> Array:
        return np.ascontiguousarray(rows).reshape(-1).view(self.dtypes[index]).reshape(-1, *self.shapes[index])


def parse_layout(text: bytes) -> Layout:
    """Return what `build_layout` wrote."""
    (x_dtype, x_shape), (y_dtype, y_shape) = (part.split(":") for part in text.decode().split(";"))
    return Layout((x_dtype, y_dtype), (_parse_shape(x_shape), _parse_shape(y_shape)))


def _parse_shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x"))) if text else ()


def _convert(rows: Array, spec: TensorSpec) -> tuple[Array, npt.NDArray[np.bool_]]:
    with np.errstate(invalid="ignore", over="ignore"):  # what does not survive is found below
        converted = rows.astype(spec.dtype)
    kept = np.isfinite(converted) if converted.dtype.kind == "f" else converted == rows
    return converted, kept.reshape(len(rows), -1).all(axis=1)
