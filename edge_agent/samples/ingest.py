"""Files of a user's samples: npz (`x`, `y`), JSON lines (`{"x": …, "y": …}`), CSV (the last column is the target)."""

import csv
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edge_agent.errors import RequestError

Row: TypeAlias = tuple[Any, Any]


def read_samples(path: Path) -> Iterator[Row]:
    """Yield (x, y) of every sample in `path`, as numbers, bools or nested lists of them.

    Raises:
        RequestError: Unreadable, of a kind not known here, or a row that is no sample; the message names the line.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".npz": _read_npz,
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".csv": _read_csv,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RequestError(f"{path}: expected a file named {', '.join(f'*{suffix}' for suffix in readers)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text: {error}") from error


def _read_npz(path: Path) -> Iterator[Row]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := {"x", "y"} - set(archive.files):
                raise RequestError(f"{path}: array {min(missing)!r} is missing; found {sorted(archive.files)}")
            x, y = archive["x"], archive["y"]
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise RequestError(f"{path}: no npz file of plain arrays: {error}") from error
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise RequestError(f"{path}: x has shape {x.shape} and y {y.shape}; expected one row of each a sample")
    for row in zip(x, y, strict=True):
        yield row[0].tolist(), row[1].tolist()


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_json_line(line, f"{path}:{number}")


def _parse_json_line(line: str, where: str) -> Row:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON: {error}") from error
    if not isinstance(document, dict) or not {"x", "y"} <= document.keys():
        raise RequestError(f'{where}: expected {{"x": …, "y": …}}')
    return document["x"], document["y"]


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        try:
            first = next(rows, [])
            header = not _is_numeric(first)
            for row in rows if header else chain([first], rows):
                if row:
                    yield _parse_csv_row(row, len(first), f"{path}:{rows.line_num}")
        except csv.Error as error:
            raise RequestError(f"{path}:{rows.line_num}: {error}") from error


def _parse_csv_row(row: list[str], columns: int, where: str) -> Row:
    if len(row) != columns or columns < 2:
        raise RequestError(f"{where}: {len(row)} columns; expected {max(columns, 2)}, the last one the target")
    if not _is_numeric(row):
        raise RequestError(f"{where}: expected finite numbers only, got {','.join(row)[:80]!r}")
    return [_parse_number(cell) for cell in row[:-1]], _parse_number(row[-1])


def _is_numeric(row: Iterable[str]) -> bool:
    try:
        return all(math.isfinite(float(cell)) for cell in row)
    except ValueError:
        return False


def _parse_number(cell: str) -> int | float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)
