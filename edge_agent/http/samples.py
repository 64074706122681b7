"""Samples that the device's user hands in as JSON; pure."""

from typing import Any

import msgspec
import numpy as np

from edge_agent.errors import RequestError
from edge_agent.http.oip import Array
from models.tensors.spec import DTYPES


class _Sample(msgspec.Struct):
    x: Any
    y: Any


class _Request(msgspec.Struct):
    samples: list[_Sample]


_DECODER = msgspec.json.Decoder(_Request)


def parse_samples(body: bytes) -> list[tuple[Array, Array]]:
    """Return (x, y) of each sample, without a batch axis.

    Raises:
        RequestError: Not JSON, no samples, or values that are no finite numbers in a regular array.
    """
    try:
        request = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(f'expected {{"samples": [{{"x", "y"}}]}} as JSON in UTF-8: {error}') from error
    return [
        (_to_array(sample.x, f"samples[{index}].x"), _to_array(sample.y, f"samples[{index}].y"))
        for index, sample in enumerate(request.samples)
    ]


def _to_array(value: Any, where: str) -> Array:
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"{where}: expected a number or nested lists of one shape: {error}") from error
    if array.dtype.name not in DTYPES or array.size == 0:
        raise RequestError(f"{where}: expected finite numbers or bools, got something else")
    if array.dtype == np.float64:
        if not np.isfinite(array).all():
            raise RequestError(f"{where}: expected finite numbers")
        with np.errstate(over="ignore"):
            single = array.astype(np.float32)
        return single if np.array_equal(single, array) else array  # half the disk, nothing lost
    return array
