"""Rows of a user's file, one after the other, whatever its size: CSV, JSON lines, Parquet, npz.

A row with names is a mapping by column, one without them (CSV with no header) a list of numbers. CSV cells stay text:
what they mean is the model's to say.
"""

import csv
import datetime as dt
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from edge_agent.errors import RequestError, StalledError

Row: TypeAlias = dict[str, Any] | list[int | float]

_BLOCK_BYTES = 64 * 1024  # of one array of an npz file that is in memory at a time
_PARQUET_ROWS = 1024


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield where each row of `path` stands, for messages, and the row.

    Raises:
        RequestError: Unreadable, of a kind not known here, or a row that is none; the message names the place.
        StalledError: The library that reads this kind is not installed.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
        ".csv": _read_csv,
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".npz": _read_npz,
        ".parquet": _read_parquet,
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


def import_pyarrow() -> Any:
    """Return the module that reads and writes Parquet; raises StalledError if it is not installed."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise StalledError("Parquet needs pyarrow: pip install 'edge-fl[parquet]'") from error
    return pq


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        try:
            first = next(rows, [])
            names = [] if is_numeric(first) else [cell.strip() for cell in first]
            if len(set(names)) != len(names):
                raise RequestError(f"{path}:1: a column's name comes twice: {','.join(names)[:200]}")
            for row in rows if names else chain([first], rows):
                if row:
                    where = f"{path}:{rows.line_num}"
                    if len(row) != len(first):
                        raise RequestError(f"{where}: {len(row)} columns, expected {len(first)}")
                    yield where, dict(zip(names, row, strict=True)) if names else _parse_cells(row, where)
        except csv.Error as error:
            raise RequestError(f"{path}:{rows.line_num}: {error}") from error


def is_numeric(cells: Iterable[str]) -> bool:
    """Return whether all `cells` are finite numbers."""
    try:
        return all(math.isfinite(float(cell)) for cell in cells)
    except ValueError:
        return False


def _parse_cells(cells: list[str], where: str) -> list[int | float]:
    if not is_numeric(cells):
        raise RequestError(f"{where}: expected finite numbers only in a file without a header")
    return [parse_number(cell) for cell in cells]


def parse_number(cell: str) -> int | float:
    """Return the number in `cell`, whole if it is written so."""
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def _read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise RequestError(f"{where}: not JSON: {error}") from error
                if not isinstance(row, dict | list):
                    raise RequestError(f"{where}: expected an object of columns, or a list")
                yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    pq = import_pyarrow()
    from pyarrow import ArrowException

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", {name: _simplify(value) for name, value in row.items()}
    except ArrowException as error:
        raise RequestError(f"{path}: no readable Parquet file: {error}") from error


def _simplify(value: Any) -> Any:
    """Return a Parquet value as JSON would hold it."""
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value


def _read_npz(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            columns = [_Column(stack.enter_context(archive.open(info))) for info in archive.infolist()]
            if not columns or len({column.rows for column in columns}) != 1:
                shapes = ", ".join(f"{name} {column.shape}" for name, column in zip(names, columns, strict=True))
                raise RequestError(f"{path}: expected one row of each array a sample, got {shapes or 'no arrays'}")
            for number, values in enumerate(zip(*(column.read() for column in columns), strict=True), 1):
                yield f"{path}: row {number}", dict(zip(names, values, strict=True))
    except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise RequestError(f"{path}: no npz file of plain arrays: {error}") from error


class _Column:
    """One array of an npz file, read from its first row to its last without ever being whole in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read the header; raises ValueError if it is no array of numbers, bools or text in C order."""
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"array format {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, is_fortran, self._dtype = read_header(file)
        if self._dtype.kind not in "fiubU" or not self.shape:
            raise ValueError(f"array of {self._dtype} and shape {self.shape}")
        if is_fortran and len(self.shape) > 1:
            raise ValueError("array in Fortran order: save it with np.ascontiguousarray")
        self._file = file
        self.rows = self.shape[0]

    def read(self) -> Iterator[Any]:
        """Yield each row as a number, text, or nested lists of them."""
        row_bytes = self._dtype.itemsize * math.prod(self.shape[1:])
        size = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, self.rows, size):
            count = min(size, self.rows - start)
            data = self._file.read(count * row_bytes)
            if len(data) != count * row_bytes:
                raise EOFError("an array ends before its last row")
            yield from np.frombuffer(data, self._dtype).reshape(count, *self.shape[1:]).tolist()
