"""The binary tensor extension of the Open Inference Protocol: tensors behind the JSON of a body; pure.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from edge_agent.errors import RequestError
from edge_agent.http.datatypes import BF16, BYTES, DATATYPE_OF, DTYPES, Array

HEADER_NAME = "Inference-Header-Content-Length"
_HEADER_MAX_DIGITS = 10
_NOTHING = memoryview(b"")
_LITTLE_ENDIAN = {datatype: dtype.newbyteorder("<") for datatype, dtype in DTYPES.items()}
# Any bytes are values of these, and the bytes are in this machine's order.
_AS_THEY_ARE = {
    datatype: dtype for datatype, dtype in DTYPES.items() if dtype.kind in "fiu" and dtype == _LITTLE_ENDIAN[datatype]
}
_LENGTH = struct.Struct("<I")
_UPPER_HALF = np.dtype("<u2")
STRINGS_MAX = 65_536  # of one tensor: each costs an object


def split_body(body: bytes | bytearray, header: bytes | None) -> tuple[bytes | bytearray | memoryview, memoryview]:
    """Return the JSON and the binary part of `body`.

    Args:
        body: Of a request.
        header: `Inference-Header-Content-Length`, how long the JSON is; without it everything is JSON.

    Raises:
        RequestError: The header is no length, or longer than the body.
    """
    if header is None:
        return body, _NOTHING
    if not header.isdigit() or len(header) > _HEADER_MAX_DIGITS:
        raise RequestError(
            f"header {HEADER_NAME}: expected the length of the JSON in bytes, got {header.decode('latin-1')!r:.80}"
        )
    size_bytes = int(header)
    if size_bytes > len(body):
        raise RequestError(f"header {HEADER_NAME} says {size_bytes} bytes, the body has {len(body)}")
    view = memoryview(body)
    return view[:size_bytes], view[size_bytes:]


class BinaryPart:
    """What is behind the JSON, taken tensor by tensor."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._taken_bytes = 0

    def take(self, size_bytes: int, name: str) -> memoryview:
        """Return the next `size_bytes` bytes, those of the input `name`; raises RequestError."""
        if size_bytes < 0:
            raise RequestError(f"input {name!r:.80}: binary_data_size must be >= 0, is {size_bytes}")
        left_bytes = len(self._data) - self._taken_bytes
        if size_bytes > left_bytes:
            hint = "" if self._data else f"; is the header {HEADER_NAME} there?"
            raise RequestError(
                f"input {name!r:.80}: binary_data_size is {size_bytes}, the binary part has {left_bytes} bytes left{hint}"
            )
        start, self._taken_bytes = self._taken_bytes, self._taken_bytes + size_bytes
        return self._data[start : self._taken_bytes]

    def check_end(self) -> None:
        """Raise RequestError if bytes are left that no input has claimed."""
        if self._taken_bytes != len(self._data):
            raise RequestError(
                f"the inputs' binary_data_size add up to {self._taken_bytes} bytes, the binary part has {len(self._data)}"
            )


class Places:
    """Where the tensors are in a binary part that has nothing but them, each as wide as its shape says."""

    def __init__(self, places: Sequence[tuple[str, np.dtype[Any], tuple[int, ...], int]], size_bytes: int) -> None:
        self._places = places
        self._size_bytes = size_bytes

    @classmethod
    def find(cls, tensors: Iterable[tuple[str, str, Sequence[int], int | None]]) -> Self | None:
        """Return the places of tensors, each a name, datatype, shape and size in bytes; None if that is not enough."""
        places, end = [], 0
        for name, datatype, shape, size_bytes in tensors:
            dtype = _AS_THEY_ARE.get(datatype)
            if dtype is None or size_bytes != math.prod(shape) * dtype.itemsize:
                return None
            places.append((name, dtype, tuple(shape), end))
            end += size_bytes
        return cls(places, end)

    def view(self, data: memoryview) -> dict[str, Array] | None:
        """Return the tensors in `data` as `parse_array` does; None if they are not all of it."""
        if len(data) != self._size_bytes:
            return None
        arrays = {name: np.ndarray(shape, dtype, data, start) for name, dtype, shape, start in self._places}
        return {name: array if array.flags.aligned else array.copy() for name, array in arrays.items()}


def parse_array(data: memoryview, datatype: str, shape: Sequence[int], name: str) -> Array:
    """Return the tensor in `data`, a read-only view of it where its place in memory allows that.

    Args:
        data: The bytes of the tensor.
        datatype: As the protocol names it, known.
        shape: Lengths >= 1.
        name: Of the input, for the error.

    Raises:
        RequestError: The bytes are not that many values, or not such values.
    """
    if datatype == BYTES:
        return _parse_strings(data, shape, name)
    dtype = _UPPER_HALF if datatype == BF16 else _LITTLE_ENDIAN[datatype]
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) != expected_bytes:
        raise RequestError(
            f"input {name!r:.80}: {datatype} of shape {list(shape)!s:.200} has {expected_bytes} bytes, got {len(data)}"
        )
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max() > 1:
        raise RequestError(f"input {name!r:.80}: expected bytes 0 and 1 as BOOL, got another")
    array = np.frombuffer(data, dtype)
    if not array.flags.aligned:  # the length of the JSON decides; kernels may load as if they were
        array = array.copy()
    if datatype == BF16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif array.dtype != DTYPES[datatype]:
        array = array.astype(DTYPES[datatype])
    return array.reshape(shape)


def build_array(array: Array) -> bytes:
    """Return `array` as it goes behind the JSON: little-endian and row-major, each string behind its length."""
    if DATATYPE_OF[array.dtype] == BYTES:
        texts = [str(text).encode() for text in array.ravel().tolist()]
        return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
    return array.astype(_LITTLE_ENDIAN[DATATYPE_OF[array.dtype]], copy=False).tobytes()


def _parse_strings(data: memoryview, shape: Sequence[int], name: str) -> Array:
    expected = math.prod(shape)
    if expected > STRINGS_MAX:
        raise RequestError(f"input {name!r:.80}: expected at most {STRINGS_MAX} strings, got {expected}", status=413)
    texts: list[str] = []
    offset = 0
    while offset < len(data) and len(texts) <= expected:
        start = offset + _LENGTH.size
        if start > len(data):
            raise RequestError(f"input {name!r:.80}: a string's 4-byte length is cut off")
        (size_bytes,) = _LENGTH.unpack_from(data, offset)
        offset = start + size_bytes
        if offset > len(data):
            raise RequestError(
                f"input {name!r:.80}: string {len(texts)} is of {size_bytes} bytes, {len(data) - start} are left"
            )
        try:
            texts.append(str(data[start:offset], "utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"input {name!r:.80}: string {len(texts)} is not UTF-8") from error
    if len(texts) != expected:
        raise RequestError(
            f"input {name!r:.80}: shape {list(shape)!s:.200} has {expected} strings, the binary data {len(texts)}"
        )
    array = np.empty(expected, object)
    array[:] = texts
    return array.reshape(shape)
