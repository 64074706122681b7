"""Samples in a user's file: of each row, which part is the input and which the target."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from edge_agent.errors import RequestError
from edge_agent.samples.rows import Row, is_numeric, parse_number, read_rows

RawSample: TypeAlias = tuple[Any, Any]

_INPUT, _TARGET = "x", "y"


def read_samples(path: Path, target: str | None = None) -> Iterator[RawSample]:
    """Yield (x, y) of every sample in `path`.

    Args:
        path: `*.csv`, `*.jsonl`, `*.parquet` or `*.npz`.
        target: Column that holds the target; by default `y`, or the last column of a CSV file.

    Returns:
        x, a mapping by column, or a list if the columns have no names; y, a number, a label, or a list.

    Raises:
        RequestError: Unreadable, or a row that is no sample; the message names the place.
    """
    for where, row in read_rows(path):
        yield _split_target(row, target, where, is_csv=path.suffix.lower() == ".csv")


def read_inputs(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row of `path` stands, and its input: without names, by column, or what stands under `x`."""
    is_csv = path.suffix.lower() == ".csv"
    for where, row in read_rows(path):
        yield where, row if isinstance(row, list) else _find_input(row, is_csv=is_csv)


def _split_target(row: Row, target: str | None, where: str, *, is_csv: bool) -> RawSample:
    if isinstance(row, list):
        if target is not None:
            raise RequestError(f"{where}: there is no column {target!r}: the columns have no names")
        if len(row) < 2:
            raise RequestError(f"{where}: {len(row)} columns, expected at least 2, the last one the target")
        return row[:-1], row[-1]
    name = target or (list(row)[-1] if is_csv else _TARGET)
    if name not in row or len(row) < 2:
        columns = ", ".join(row)
        raise RequestError(
            f"{where}: expected the target in {name!r} and an input beside it, got columns {columns:.200}"
        )
    y = _parse_target(row.pop(name), where)
    return _find_input(row, is_csv=is_csv), y


def _find_input(row: dict[str, Any], *, is_csv: bool) -> Any:
    """Return what stands under `x`, unless that is a column among others."""
    x = row.get(_INPUT)
    is_whole = isinstance(x, dict | list) or (row.keys() <= {_INPUT, _TARGET} and x is not None)
    return x if is_whole and not is_csv else row


def _parse_target(value: Any, where: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RequestError(f"{where}: the target is missing")
    if not isinstance(value, str):
        return value
    return parse_number(value) if is_numeric([value]) else value.strip()
