"""The user's private samples on disk, sealed: an acknowledged one survives a SIGKILL; several processes may use the file."""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edge_agent.errors import RequestError, StalledError, TransientError
from edge_agent.samples.database import RESERVE_BYTES, Reserve, connect, delete, delete_unsealed, migrate, read_version
from edge_agent.samples.sealing import Array, Opened, Record, Sample, Sealer, SealError, parse_layout
from models.tensors.spec import TensorSpec

_CHUNK_MAX_BYTES = 16 * 1024 * 1024  # deleted at once where the disk has room: a second of slow flash


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much is kept.

    Attributes:
        max_count: Samples at most; None for no bound.
        keep_s: How long each is kept; None for ever.
        forgets_oldest: Whether the oldest give way to new ones; otherwise these are refused.
    """

    max_count: int | None = None
    keep_s: float | None = None
    forgets_oldest: bool = False


class SampleStore:
    """Samples in one SQLite file; may be used from several threads."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        *,
        model: str,
        retention: Retention,
        clock: Callable[[], float],
    ) -> None:
        self._path = path
        self._connection = connection
        self._model = model
        self._retention = retention
        self._clock = clock
        self._reserve = Reserve(path)
        self._lock = threading.RLock()
        self._sealer: Sealer | None = None
        self._has_traces = True  # of what was deleted, in the log; a process that was killed may have left them

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_key(self) -> bool:
        """Whether there is a key already that the samples are sealed with; raises StalledError."""
        with self._reading():
            return self._find_check() is not None

    @property
    def is_locked(self) -> bool:
        return self._sealer is None

    def unlock(self, key: bytes) -> None:
        """Seal and open with `key` from now on, and seal what an earlier release has left without.

        Raises:
            SealError: The samples are sealed with another.
            StalledError: What was left cannot be sealed now.
        """
        sealer = Sealer(key)
        try:
            with self._lock:
                migrate(self._connection, partial(self._seal, sealer, fields={}), sealer.build_check())
                with self._connection:
                    self._connection.execute("BEGIN IMMEDIATE")
                    check = self._find_check()
                    if check is None:
                        self._connection.execute("INSERT INTO key VALUES (?)", (sealer.build_check(),))
        except (sqlite3.Error, TransientError) as error:
            raise StalledError(f"{self._path}: {error}") from error
        if check is not None and not sealer.is_key_of(check):
            raise SealError(
                f"{self._path} is sealed with another key than this device has now: bring that key back, "
                "or begin anew with `edge-agent forget --all`"
            )
        self._sealer = sealer

    def add(self, samples: Sequence[Sample], fields: Sequence[Mapping[str, str]] = ()) -> list[int]:
        """Keep all of `samples` or none; durable on return.

        Args:
            samples: (x, y) each.
            fields: Of each, the values by which its owner may ask to have it forgotten; none if left out.

        Returns:
            Their ids, in order.

        Raises:
            RequestError: The store is full, or the disk is (status 507); a dtype that no model takes.
            SealError: There is no key.
        """
        sealer = self._find_sealer()
        try:
            with self._lock, self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._make_room(len(samples))
                pairs = zip(samples, fields or [{}] * len(samples), strict=True)
                rows = [self._seal(sealer, row, *pair) for row, pair in enumerate(pairs, self._find_next_row())]
                self._reserve.grow_for(sum(len(sealed) for *_, sealed in rows))
                self._connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
                return [row[0] for row in rows]
        except OSError as error:
            raise RequestError(f"the samples cannot be kept: {error.strerror or error}", status=507) from error
        except sqlite3.Error as error:
            raise RequestError(f"the samples cannot be kept: {error}", status=507) from error

    def count(self, *, after: int = 0) -> int:
        """Return how many there are with an id above `after`; raises StalledError."""
        with self._reading():
            return self._count(after)

    def find_newest(self) -> int:
        """Return the id of the newest there ever was, 0 before the first; raises StalledError."""
        with self._reading():
            return self._find_next_row() - 1

    def load(self, x_spec: TensorSpec, y_spec: TensorSpec) -> tuple[Array, Array]:
        """Return all samples of the model that fit both specs, stacked: x (n, *row shape) and y (n, *row shape), by age.

        A sample fits if its shapes are the specs' row shapes and its values survive the change to the
        specs' dtypes: finite for floats, unchanged for integers and bool. Others are skipped.

        Raises:
            SealError: There is no key, or a record does not open with it.
            StalledError: The file is damaged.
        """
        by_layout: dict[bytes, tuple[list[int], list[bytes]]] = {}
        for record, opened in self._open_all("WHERE model = ?", (self._model,)):
            rows, data = by_layout.setdefault(opened.layout, ([], []))
            rows.append(record.row)
            data.append(opened.data)
        shapes = (tuple(x_spec.row_shape), tuple(y_spec.row_shape))
        ids, xs, ys = [np.zeros(0, np.int64)], [_empty(x_spec)], [_empty(y_spec)]
        for text, (rows, data) in by_layout.items():
            layout = parse_layout(text)
            if layout.shapes == shapes:
                x, y, fits = layout.load(data, x_spec, y_spec)
                ids.append(np.array(rows, np.int64)[fits])
                xs.append(x[fits])
                ys.append(y[fits])
        order = np.argsort(np.concatenate(ids))
        return np.concatenate(xs)[order], np.concatenate(ys)[order]

    def find(self, matches: Callable[[Opened], bool]) -> list[int]:
        """Return the ids of the samples, of whatever model, that `matches` says yes to; raises as `load`."""
        return [record.row for record, opened in self._open_all() if matches(opened)]

    def forget(self, ids: Iterable[int] | None = None) -> int:
        """Delete samples, also where the disk is full; no byte of them is in any file on return. Needs no key.

        Args:
            ids: Which; all of them if None. Those that are not here are ignored.

        Returns:
            How many there were.

        Raises:
            TransientError: Not all could be deleted, or their traces not yet.
            SealError: Only some of what an earlier release left without a seal: that is sealed first, with a key.
        """
        try:
            if read_version(self._connection) == 0:
                return self._forget_unsealed(ids)
            with self._lock, self._reserve.lend() as free_bytes:
                self._has_traces = True
                rows = self._list(ids)
                delete(self._connection, rows, max(RESERVE_BYTES // 4, min(_CHUNK_MAX_BYTES, free_bytes // 4)))
                if ids is None and self.is_locked:  # the key is lost; another may take its place
                    self._connection.execute("DELETE FROM key WHERE NOT EXISTS (SELECT 1 FROM records)")
                self._has_traces = False
        except sqlite3.Error as error:
            raise TransientError(f"not everything could be forgotten: {error}") from error
        return len(rows)

    def forget_old(self) -> int:
        """Delete what is kept for no longer, and every trace of what was deleted; raises as `forget`, and StalledError."""
        with self._reading():
            if read_version(self._connection) == 0:
                return 0
            old = [row for row, _ in self._list_old(0)]
            if old or self._has_traces:
                return self.forget(old)
        return 0

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _forget_unsealed(self, ids: Iterable[int] | None) -> int:
        if ids is not None:
            raise SealError(f"{self._path} holds samples of an earlier release: they are sealed first, with a key")
        with self._lock, self._reserve.lend():
            return delete_unsealed(self._connection)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Have the store for oneself; what SQLite says of a damaged file is a StalledError."""
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise StalledError(f"{self._path}: {error}") from error

    def _count(self, after: int = 0) -> int:
        if not read_version(self._connection):  # all of an earlier release
            return int(self._connection.execute("SELECT count(*) FROM samples").fetchone()[0])
        return int(self._connection.execute("SELECT count(*) FROM records WHERE row > ?", (after,)).fetchone()[0])

    def _make_room(self, count: int) -> None:
        old = [(row,) for row, _ in self._list_old(count)]
        if old:
            self._has_traces = True
            self._connection.executemany("DELETE FROM records WHERE row = ?", old)
        most = self._retention.max_count
        if most is not None and self._count() + count > most:
            raise RequestError(f"the device keeps at most {most} samples (samples.max_count)", status=507)

    def _list_old(self, coming: int) -> list[tuple[int, int]]:
        """Return (row, size) of what is too old, or gives way to so many that are `coming`."""
        limits = self._retention
        oldest_s = -1 if limits.keep_s is None else int(self._clock() - limits.keep_s)
        surplus = 0
        if limits.forgets_oldest and limits.max_count is not None and coming <= limits.max_count:
            surplus = max(0, self._count() + coming - limits.max_count)
        rows = self._connection.execute(
            "SELECT row, length(sealed) FROM records WHERE kept_s < ? UNION"
            " SELECT * FROM (SELECT row, length(sealed) FROM records ORDER BY row LIMIT ?)",
            (oldest_s, surplus),
        )
        return [tuple(row) for row in rows]

    def _list(self, ids: Iterable[int] | None) -> list[tuple[int, int]]:
        """Return (row, size) of those of `ids` that are here, or of all."""
        chosen = "" if ids is None else "WHERE row IN (SELECT value FROM json_each(?))"
        values = () if ids is None else (json.dumps(list(ids)),)
        rows = self._connection.execute(f"SELECT row, length(sealed) FROM records {chosen} ORDER BY row", values)  # noqa: S608
        return [tuple(row) for row in rows]

    def _find_next_row(self) -> int:
        found = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return 1 + int(found[0] if found else 0)

    def _seal(self, sealer: Sealer, row: int, sample: Sample, fields: Mapping[str, str]) -> tuple[int, str, int, bytes]:
        record = Record(row=row, model=self._model, kept_s=int(self._clock()))
        return record.row, record.model, record.kept_s, sealer.seal(record, sample, fields)

    def _open_all(self, condition: str = "", values: tuple[str, ...] = ()) -> Iterator[tuple[Record, Opened]]:
        sealer = self._find_sealer()
        with self._reading():
            for row, model, kept_s, sealed in self._connection.execute(
                f"SELECT * FROM records {condition} ORDER BY row",  # noqa: S608 - a constant
                values,
            ):
                record = Record(row=row, model=model, kept_s=kept_s)
                yield record, sealer.open(record, sealed)

    def _find_check(self) -> bytes | None:
        if read_version(self._connection) == 0:
            return None
        found = self._connection.execute("SELECT checked FROM key").fetchone()
        return found[0] if found else None

    def _find_sealer(self) -> Sealer:
        if self._sealer is None:
            raise SealError(f"{self._path} is sealed, and its key has not been given")
        return self._sealer


def open_samples(
    path: Path,
    *,
    model: str,
    key: bytes | None = None,
    retention: Retention | None = None,
    clock: Callable[[], float] = time.time,
) -> SampleStore:
    """Return the store at `path`, made if it is not there, readable by its owner only.

    Args:
        path: Its file; room for deletions is set aside beside it.
        model: What new samples are of, and loaded ones.
        key: 32 bytes; without it, samples can be counted and forgotten only.
        retention: How much is kept; without it, everything.
        clock: s since 1970.

    Raises:
        StalledError: The file cannot be opened, or is no store of samples.
        SealError: Its samples are sealed with another key.
    """
    store = SampleStore(path, connect(path), model=model, retention=retention or Retention(), clock=clock)
    if key is not None:
        try:
            store.unlock(key)
        except StalledError:
            store.close()
            raise
    return store


def _empty(spec: TensorSpec) -> Array:
    return np.zeros((0, *spec.row_shape), spec.dtype)
