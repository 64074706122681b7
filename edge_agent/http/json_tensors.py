"""Tensors as JSON has them: `data`, a flat list or nested ones in row-major order; pure."""

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from edge_agent.errors import RequestError
from edge_agent.http.datatypes import BINARY_ONLY, BYTES, DATATYPE_OF, DTYPES, Array

_LIMITS = {
    dtype: (float(np.finfo(dtype).min), float(np.finfo(dtype).max))
    if dtype.kind == "f"
    else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    for dtype in DTYPES.values()
    if dtype.kind in "fiu"
}
_ELEMENTS: dict[str, type] = {  # by NumPy's kind
    "f": list[float],
    "i": list[int],
    "u": list[int],
    "b": list[bool],
    "O": list[str],
}
_DECODERS: dict[str, msgspec.json.Decoder[list[Any]]] = {
    kind: msgspec.json.Decoder(elements) for kind, elements in _ELEMENTS.items()
}
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


def parse_data(data: msgspec.Raw, datatype: str, shape: Sequence[int], name: str) -> Array:
    """Return the tensor that `data` lists.

    Args:
        data: JSON.
        datatype: As the protocol names it, known.
        shape: Lengths >= 1.
        name: Of the input, for the error.

    Raises:
        RequestError: Not such values, or not that many.
    """
    if datatype in BINARY_ONLY:
        raise RequestError(f"input {name!r:.80}: expected {datatype} as binary data: JSON has no such numbers")
    try:
        values = _parse_values(data, DTYPES[datatype].kind)
    except DECODE_ERRORS as error:
        what = "strings" if datatype == BYTES else f"{datatype} numbers"
        raise RequestError(f"input {name!r:.80}: data must be a list of {what}: {error}") from error
    return build_tensor(values, datatype, shape, name)


def build_tensor(values: Sequence[Any], datatype: str, shape: Sequence[int], name: str) -> Array:
    """Return the tensor of `values`, Python's own of the right kind.

    Args:
        values: In row-major order.
        datatype: As the protocol names it, known, and not one that has no such values.
        shape: Lengths >= 1.
        name: Of the input, for the error.

    Raises:
        RequestError: Not that many values, or one is beyond what the datatype holds.
    """
    dtype = DTYPES[datatype]
    if len(values) != math.prod(shape):
        raise RequestError(
            f"input {name!r:.80}: shape {list(shape)} has {math.prod(shape)} values, data has {len(values)}"
        )
    if dtype.kind in "bO":
        array = np.array(values, dtype)
    else:
        array = _build_floats(values, dtype, name) if dtype.kind == "f" else _build_integers(values, dtype, name)
    return array.reshape(shape)


def list_values(array: Array, name: str) -> list[Any]:
    """Return the values of an output as `data` lists them; raises RequestError for a dtype that JSON does not have."""
    if DATATYPE_OF[array.dtype] in BINARY_ONLY:
        raise RequestError(
            f"output {name!r}: {DATATYPE_OF[array.dtype]} is answered as binary data only; set its parameter binary_data"
        )
    return array.ravel().tolist()


def _parse_values(data: msgspec.Raw, kind: str) -> list[Any]:
    try:
        return _DECODERS[kind].decode(data)
    except msgspec.ValidationError:
        values = msgspec.json.decode(data)
        if not (isinstance(values, list) and values and isinstance(values[0], list)):
            raise
    while values and all(isinstance(value, list) for value in values):
        values = list(chain.from_iterable(values))
    return msgspec.convert(values, _ELEMENTS[kind])


def _build_floats(values: Sequence[float], dtype: np.dtype[Any], name: str) -> Array:
    if dtype.itemsize == 8:
        return np.array(values, dtype)
    try:
        data = struct.pack(f"<{len(values)}f", *values)  # a quarter of the time that NumPy takes for a list
    except OverflowError as error:
        raise _build_beyond(dtype, name) from error
    return np.frombuffer(data, dtype)


def _build_integers(values: Sequence[int], dtype: np.dtype[Any], name: str) -> Array:
    if dtype == np.uint64 and not (min(values) >= 0 and max(values) < 2**64):  # NumPy 1 wraps what is negative
        raise _build_beyond(dtype, name)
    try:
        wide = np.array(values, np.uint64 if dtype == np.uint64 else np.int64)
    except OverflowError as error:
        raise _build_beyond(dtype, name) from error
    least, largest = _LIMITS[dtype]
    if wide.min() < least or wide.max() > largest:
        raise _build_beyond(dtype, name)
    return wide.astype(dtype, copy=False)


def _build_beyond(dtype: np.dtype[Any], name: str) -> RequestError:
    least, largest = _LIMITS[dtype]
    return RequestError(f"input {name!r:.80}: a value is beyond {DATATYPE_OF[dtype]} [{least}, {largest}]")
