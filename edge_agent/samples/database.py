"""The SQLite file of the samples: its tables, what an earlier release left in it, and deletion without a trace.

user_version 0 --made--------------------------------------> 2
             `-tables of 0.1 without a seal -sealed-> 1 -plain bytes gone from disk-> 2
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_agent.errors import StalledError, TransientError
from edge_agent.samples.sealing import Array, Sample

BUSY_TIMEOUT_S = 10  # another process may be in the middle of a commit on slow flash
RESERVE_BYTES = 256 * 1024  # of a full disk: what a deletion writes before it gives room back
_PAGE_BYTES = 4096
_PRAGMAS = (
    "auto_vacuum = INCREMENTAL",
    "journal_mode = WAL",
    "synchronous = FULL",
    "secure_delete = ON",
    "wal_autocheckpoint = 16",  # pages: a deletion on a full disk needs room for what is only in the log
)
_SEALED, _CLEAN = 1, 2
_TABLES = (
    """CREATE TABLE records (
        row INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, kept_s INTEGER NOT NULL, sealed BLOB NOT NULL
    )""",
    "CREATE INDEX by_age ON records (kept_s)",
    "CREATE TABLE key (checked BLOB NOT NULL)",
)

SealRow = Callable[[int, Sample], tuple[int, str, int, bytes]]


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection to the file at `path`, made if it is not there, readable by its owner only.

    Raises:
        StalledError: It cannot be opened, or is no database.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        if not read_version(connection):
            _make_tables(connection)
    except (OSError, sqlite3.Error) as error:
        raise StalledError(f"{path}: {error}") from error
    return connection


def read_version(connection: sqlite3.Connection) -> int:
    """Return how far this file has come; 0 for one that holds samples without a seal."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, seal: SealRow, check: bytes) -> None:
    """Seal what an earlier release kept without; all of it or, if this process dies, nothing.

    Raises:
        TransientError: Another process reads the file.
        sqlite3.Error: The disk is full.
    """
    if read_version(connection) == 0:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if read_version(connection) == 0:  # no other process was first
                _build_tables(connection)
                rows = connection.execute("SELECT * FROM samples ORDER BY id")
                sealed = (seal(row["id"], (_decode(row, "x"), _decode(row, "y"))) for row in rows)
                connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", sealed)
                connection.execute("INSERT INTO key VALUES (?)", (check,))
                # A number is never given again, not even that of a sample that was forgotten.
                connection.execute("DELETE FROM sqlite_sequence WHERE name = 'records'")
                connection.execute("UPDATE sqlite_sequence SET name = 'records' WHERE name = 'samples'")
                connection.execute("DROP TABLE samples")
                connection.execute(f"PRAGMA user_version = {_SEALED}")
    if read_version(connection) == _SEALED:
        truncate_wal(connection)  # only now have the zeros of the dropped table reached the file itself
        connection.execute(f"PRAGMA user_version = {_CLEAN}")


def truncate_wal(connection: sqlite3.Connection) -> None:
    """Bring every change to the database itself and empty its log; raises TransientError if others keep reading."""
    if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        raise TransientError("what was deleted is still in the log of the samples: another process is reading them")


def delete(connection: sqlite3.Connection, records: Sequence[tuple[int, int]], budget_bytes: int) -> None:
    """Delete records and give their room back to the disk; no byte of them is in any file on return.

    Args:
        connection: As `connect` returns it.
        records: (row, size in bytes) each.
        budget_bytes: About so much is written before the log is emptied again.

    Raises:
        TransientError: Another process reads the file.
        sqlite3.Error: The disk is full.
    """
    truncate_wal(connection)
    for rows in _divide(records, budget_bytes):
        with connection:
            connection.execute("DELETE FROM records WHERE row IN (SELECT value FROM json_each(?))", (json.dumps(rows),))
        truncate_wal(connection)
    _shrink(connection, max(1, budget_bytes // (2 * _PAGE_BYTES)))


def delete_unsealed(connection: sqlite3.Connection) -> int:
    """Delete all that an earlier release kept without a seal; returns how many there were, and raises as `delete`."""
    truncate_wal(connection)
    with connection:
        count = connection.execute("DELETE FROM samples").rowcount
    truncate_wal(connection)
    _shrink(connection, RESERVE_BYTES // _PAGE_BYTES)
    return count


class Reserve:
    """A file beside the database that takes up room, to be lent to a deletion on a full disk."""

    def __init__(self, database_path: Path) -> None:
        self._path = database_path.with_name(f"{database_path.name}.reserve")
        self._log_path = database_path.with_name(f"{database_path.name}-wal")

    def grow_for(self, coming_bytes: int) -> None:
        """Have room enough to bring the log, with records of so many bytes more, to the database, and to delete then.

        Raises:
            OSError: The disk has no such room.
        """
        self._grow(RESERVE_BYTES + self._log_path.stat().st_size + 2 * coming_bytes)

    @contextlib.contextmanager
    def lend(self) -> Iterator[int]:
        """Give the room away for a while; yields how many bytes are free now."""
        size_bytes = RESERVE_BYTES
        with contextlib.suppress(FileNotFoundError):
            size_bytes = max(size_bytes, self._path.stat().st_size)
            self._path.unlink()
        try:
            disk = os.statvfs(self._path.parent)
            yield disk.f_bavail * disk.f_frsize
        finally:
            with contextlib.suppress(OSError):  # the next sample asks for it again
                self._grow(size_bytes)

    def _grow(self, size_bytes: int) -> None:
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if os.fstat(descriptor).st_size < size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
        finally:
            os.close(descriptor)


def _make_tables(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        held = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "samples" not in held and "records" not in held:
            _build_tables(connection)
            connection.execute(f"PRAGMA user_version = {_CLEAN}")


def _build_tables(connection: sqlite3.Connection) -> None:
    for statement in _TABLES:
        connection.execute(statement)


def _decode(row: sqlite3.Row, name: str) -> Array:
    shape = [int(size) for size in row[f"{name}_shape"].split("x") if size]
    return np.frombuffer(row[name], row[f"{name}_dtype"]).reshape(shape)


def _divide(records: Sequence[tuple[int, int]], budget_bytes: int) -> Iterator[list[int]]:
    """Yield the rows in parts of about `budget_bytes`, at least one each."""
    part: list[int] = []
    used_bytes = 0
    for row, size_bytes in records:
        cost_bytes = size_bytes + 2 * _PAGE_BYTES  # its leaf, and a page of the list of free ones
        if part and used_bytes + cost_bytes > budget_bytes:
            yield part
            part, used_bytes = [], 0
        part.append(row)
        used_bytes += cost_bytes
    if part:
        yield part


def _shrink(connection: sqlite3.Connection, pages: int) -> None:
    """Give what deletions left free back to the disk, so many `pages` at a time."""
    while (free := _count_free_pages(connection)) > 0:
        connection.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
        truncate_wal(connection)
        if _count_free_pages(connection) >= free:  # a file of an earlier release keeps its size
            return


def _count_free_pages(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA freelist_count").fetchone()[0])
