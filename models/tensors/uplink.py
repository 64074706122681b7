"""How an update travels from a device to the coordinator: as float32, or rounded to int8 in a quarter of the bytes.

    float32   size values, little-endian
    int8      a scale for every 256 values, little-endian float32, then size int8: value = scale * int8

Rounding is stochastic, up or down with the chances that make its mean the value itself, so that the mean of a cohort
strays far less than one update does. It comes after a device's noise, as post-processing: it costs no privacy. Where
the coordinator adds the noise, it clips what it has decoded.

Source:
    Alistarh et al. 2017, "QSGD", arXiv:1610.02132, with the largest value of a bucket as its scale.
"""

import numpy as np
import numpy.typing as npt

from models.contract.privacy import Uplink
from models.tensors.layout import Vector, build_vector_bytes, parse_vector_bytes

STRETCH_MAX = 1.126  # an update grows by less: in each chunk by sqrt(256) scales, of at most its norm / 127

_CHUNK = 256  # values with a scale of their own: 4 bytes on 256
_LEVELS = 127
_BLOCK = 256  # chunks at once, which stay in the processor's cache


def encode_update(update: Vector, uplink: Uplink, generator: np.random.Generator) -> bytes:
    """Return the bytes of `update`, shape (n,), finite; `generator` rounds, and protects nobody."""
    if uplink == "float32":
        return build_vector_bytes(update)
    scales, codes = np.empty(_count_chunks(update.size), "<f4"), np.empty(update.size, np.int8)
    for chunk in range(0, scales.size, _BLOCK):
        block = update[_CHUNK * chunk : _CHUNK * (chunk + _BLOCK)].astype(np.float64)
        rows = np.pad(block, (0, -block.size % _CHUNK)).reshape(-1, _CHUNK)
        scale = _round_up(np.abs(rows).max(axis=1) / _LEVELS)
        rows /= np.where(scale > 0, scale, 1)[:, np.newaxis]
        rows += generator.random(rows.shape)
        rounded = np.minimum(np.floor(rows), _LEVELS)  # 127 and almost 1 add up to 128 in float64
        scales[chunk : chunk + _BLOCK] = scale
        codes[_CHUNK * chunk : _CHUNK * (chunk + _BLOCK)] = rounded.ravel()[: block.size]
    return scales.tobytes() + codes.tobytes()


def decode_update(data: bytes, uplink: Uplink, *, size: int) -> Vector:
    """Return the update in `data`, shape (size,), which may hold what is not finite.

    Raises:
        ValueError: Not so many bytes, or a scale that is negative or not finite.
    """
    if uplink == "float32":
        _check_length(data, 4 * size, f"{size} values of float32")
        return parse_vector_bytes(data)
    chunks = _count_chunks(size)
    _check_length(data, 4 * chunks + size, f"{chunks} scales of float32 and {size} values of int8")
    scales, codes = np.frombuffer(data, "<f4", count=chunks), np.frombuffer(data, np.int8, offset=4 * chunks)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise ValueError("holds a scale that is negative, NaN or infinite")
    update, whole = np.empty(size, np.float32), size - size % _CHUNK
    with np.errstate(over="ignore"):  # infinity tells enough
        rows = codes[:whole].reshape(-1, _CHUNK)
        np.multiply(rows, scales[: len(rows), np.newaxis], out=update[:whole].reshape(-1, _CHUNK))
        np.multiply(codes[whole:], scales[len(rows) :], out=update[whole:])
    return update


def _count_chunks(size: int) -> int:
    return -(-size // _CHUNK)


def _check_length(data: bytes, expected: int, what: str) -> None:
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes, expected {expected}: {what}")


def _round_up(values: npt.NDArray[np.float64]) -> Vector:
    """Return the least float32 that is not below each of `values`."""
    nearest = values.astype(np.float32)
    return np.where(nearest < values, np.nextafter(nearest, np.float32(np.inf)), nearest)
