"""Samples that the device's user hands in as JSON; pure."""

from typing import Any

import msgspec
import numpy as np

from edge_agent.errors import RequestError
from edge_agent.http.datatypes import Array
from models.tensors.spec import DTYPES


class _Sample(msgspec.Struct):
    x: Any
    y: Any


class _Request(msgspec.Struct):
    samples: list[_Sample]


class _Rows(msgspec.Struct):
    rows: list[Any]


class _Feedback(msgspec.Struct):
    id: str
    target: Any


class _Forget(msgspec.Struct):
    ids: list[int | str] = []
    where: dict[str, str | int | float | bool] = {}
    all: bool = False


_DECODER = msgspec.json.Decoder(_Request)
_ROWS_DECODER = msgspec.json.Decoder(_Rows)
_FORGET_DECODER = msgspec.json.Decoder(_Forget)
_FEEDBACK_DECODER = msgspec.json.Decoder(_Feedback)


def parse_samples(body: bytes | bytearray) -> list[tuple[Array | dict[str, Any], Array | str]]:
    """Return (x, y) of each sample, without a batch axis; an x by column, and a y that is a label, as they came.

    Raises:
        RequestError: Not JSON, no samples, or values that are no finite numbers in a regular array.
    """
    try:
        request = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(f'expected {{"samples": [{{"x", "y"}}]}} as JSON in UTF-8: {error}') from error
    return [
        (
            sample.x if isinstance(sample.x, dict) else _to_array(sample.x, f"samples[{index}].x"),
            sample.y if isinstance(sample.y, str) else _to_array(sample.y, f"samples[{index}].y"),
        )
        for index, sample in enumerate(request.samples)
    ]


def parse_rows(body: bytes | bytearray) -> list[Any]:
    """Return raw rows, for the model's features to make inputs of; raises RequestError."""
    try:
        rows = _ROWS_DECODER.decode(body).rows
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(f'expected {{"rows": [{{column: value}}]}} as JSON in UTF-8: {error}') from error
    if not rows:
        raise RequestError("expected at least one row")
    return rows


def parse_feedback(body: bytes | bytearray) -> tuple[str, Any]:
    """Return the id of an answered request and its truth, as it came; raises RequestError."""
    try:
        feedback = _FEEDBACK_DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(f'expected {{"id", "target"}} as JSON in UTF-8: {error}') from error
    return feedback.id, feedback.target


def parse_forget(body: bytes | bytearray) -> tuple[list[int | str], dict[str, Any]]:
    """Return ids, and values by column, of what is to be forgotten; both empty for all of it.

    Raises:
        RequestError: Not JSON, or not exactly one of the three.
    """
    try:
        wish = _FORGET_DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(f'expected {{"ids"}}, {{"where"}} or {{"all": true}} as JSON in UTF-8: {error}') from error
    if sum(map(bool, (wish.ids, wish.where, wish.all))) != 1:
        raise RequestError('expected exactly one of {"ids": [...]}, {"where": {column: value}} and {"all": true}')
    if any(isinstance(row, int) and not 0 < row < 1 << 63 for row in wish.ids):
        raise RequestError("expected the ids of samples, counted from 1, or of answered requests")
    return wish.ids, wish.where


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
