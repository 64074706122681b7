"""Tensors as bytes for whoever knows what they look like: nothing that is read can be anything but these tensors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from models.tensors.spec import TensorSpec

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]


def pack_tensors(tensors: Arrays) -> bytes:
    """Return `tensors`, by name, as bytes; strings are those of arrays of `str` objects."""
    return msgspec.msgpack.encode({name: _pack(array) for name, array in tensors.items()})


def unpack_tensors(data: bytes, specs: Iterable[TensorSpec]) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors in `data`, which look like `specs`.

    Raises:
        ValueError: They do not, or do not have the same number of rows, >= 1.
    """
    try:
        packed = msgspec.msgpack.decode(data, type=dict[str, bytes | list[str]])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"no tensors: {error}") from error
    expected = {spec.name: spec for spec in specs}
    if packed.keys() != expected.keys():
        raise ValueError(f"tensors {sorted(packed)}, expected {sorted(expected)}")
    tensors = {name: _unpack(packed[name], spec) for name, spec in expected.items()}
    rows = {len(array) for array in tensors.values()}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"tensors of {sorted(rows)} rows, expected the same number >= 1")
    return tensors


def _pack(array: npt.NDArray[Any]) -> bytes | list[str]:
    return [str(value) for value in array.flat] if array.dtype.kind in "OUS" else np.ascontiguousarray(array).tobytes()


def _unpack(packed: bytes | list[str], spec: TensorSpec) -> npt.NDArray[Any]:
    is_text = spec.dtype == "string"
    if isinstance(packed, bytes) is is_text:
        raise ValueError(f"tensor {spec.name!r} is not of {spec.dtype}")
    unit = math.prod(spec.row_shape) * (1 if is_text else spec.numpy_dtype.itemsize)
    if len(packed) % unit:
        raise ValueError(f"tensor {spec.name!r} has {len(packed)}, no multiple of {unit}")
    flat = np.array(packed, object) if isinstance(packed, list) else np.frombuffer(packed, spec.numpy_dtype)
    return flat.reshape(len(packed) // unit, *spec.row_shape)
