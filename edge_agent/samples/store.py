"""The user's private samples on disk: an acknowledged one survives a SIGKILL; several processes may use the file."""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_agent.errors import RequestError, StalledError
from models.tensors.spec import DTYPES, TensorSpec

Array: TypeAlias = npt.NDArray[Any]
Sample: TypeAlias = tuple[Array, Array]

_BUSY_TIMEOUT_S = 10  # another process may be in the middle of a commit on slow flash
_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    x BLOB NOT NULL, x_dtype TEXT NOT NULL, x_shape TEXT NOT NULL,
    y BLOB NOT NULL, y_dtype TEXT NOT NULL, y_shape TEXT NOT NULL
)
"""


class SampleStore:
    """Samples in one SQLite file; may be used from several threads."""

    def __init__(self, connection: sqlite3.Connection, max_count: int | None) -> None:
        self._connection = connection
        self._max_count = max_count
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, samples: Sequence[Sample]) -> list[int]:
        """Keep all of `samples` or none; durable on return.

        Returns:
            Their ids, in order.

        Raises:
            RequestError: The store is full, or the disk is (status 507); a dtype that no model takes.
        """
        rows = [(*_encode(x, "x"), *_encode(y, "y")) for x, y in samples]
        try:
            with self._lock, self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                if self._max_count is not None and self._count() + len(rows) > self._max_count:
                    raise RequestError(
                        f"the device keeps at most {self._max_count} samples (samples.max_count)", status=507
                    )
                return [self._insert(row) for row in rows]
        except sqlite3.Error as error:
            raise RequestError(f"the samples cannot be kept: {error}", status=507) from error

    def count(self) -> int:
        with self._lock:
            return self._count()

    def load(self, x_spec: TensorSpec, y_spec: TensorSpec) -> tuple[Array, Array]:
        """Return all samples that fit both specs, stacked: x (n, *row shape) and y (n, *row shape), by age.

        A sample fits if its shapes are the specs' row shapes and its values survive the change to the
        specs' dtypes: finite for floats, unchanged for integers and bool. Others are skipped.
        """
        shapes = (_shape_text(x_spec.row_shape), _shape_text(y_spec.row_shape))
        ids, xs, ys = [np.zeros(0, np.int64)], [_empty(x_spec)], [_empty(y_spec)]
        for x_dtype, y_dtype, rows in self._select(shapes):
            x, x_fits = _convert(b"".join(row[1] for row in rows), x_dtype, x_spec)
            y, y_fits = _convert(b"".join(row[2] for row in rows), y_dtype, y_spec)
            fits = x_fits & y_fits
            ids.append(np.array([row[0] for row in rows], np.int64)[fits])
            xs.append(x[fits])
            ys.append(y[fits])
        order = np.argsort(np.concatenate(ids))
        return np.concatenate(xs)[order], np.concatenate(ys)[order]

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _count(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM samples").fetchone()[0])

    def _insert(self, row: tuple[object, ...]) -> int:
        cursor = self._connection.execute(
            "INSERT INTO samples (x, x_dtype, x_shape, y, y_dtype, y_shape) VALUES (?, ?, ?, ?, ?, ?)", row
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _select(self, shapes: tuple[str, str]) -> Iterator[tuple[str, str, list[tuple[int, bytes, bytes]]]]:
        with self._lock:
            kinds = self._connection.execute(
                "SELECT DISTINCT x_dtype, y_dtype FROM samples WHERE x_shape = ? AND y_shape = ?", shapes
            ).fetchall()
        for x_dtype, y_dtype in kinds:
            with self._lock:
                rows = self._connection.execute(
                    "SELECT id, x, y FROM samples WHERE x_shape = ? AND y_shape = ? AND x_dtype = ? AND y_dtype = ?",
                    (*shapes, x_dtype, y_dtype),
                ).fetchall()
            yield x_dtype, y_dtype, rows


def open_samples(path: Path, *, max_count: int | None = None) -> SampleStore:
    """Return the store at `path`, made if it is not there, readable by its owner only; `add` stops at `max_count`.

    Raises:
        StalledError: The file cannot be opened, or is no store of samples.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute(_SCHEMA)
    except (OSError, sqlite3.Error) as error:
        raise StalledError(f"{path}: {error}") from error
    return SampleStore(connection, max_count)


def _encode(array: Array, what: str) -> tuple[bytes, str, str]:
    if array.dtype.name not in DTYPES:
        raise RequestError(f"{what} is {array.dtype.name}, expected one of {', '.join(DTYPES)}")
    return array.tobytes(), array.dtype.name, _shape_text(array.shape)


def _convert(data: bytes, dtype: str, spec: TensorSpec) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the rows in `data` in the dtype of `spec`, and which of them survived the change."""
    rows = np.frombuffer(data, dtype).reshape(-1, *spec.row_shape)
    with np.errstate(invalid="ignore", over="ignore"):  # what does not survive is found below
        converted = rows.astype(spec.dtype)
    kept = np.isfinite(converted) if converted.dtype.kind == "f" else converted == rows
    return converted, kept.reshape(len(rows), -1).all(axis=1)


def _empty(spec: TensorSpec) -> Array:
    return np.zeros((0, *spec.row_shape), spec.dtype)


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
