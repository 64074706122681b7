"""The SQLite file of the samples: its tables, what an earlier release left in it, and room to delete when the disk is full.

user_version 0 --made--------------------------------------> 2
             `-tables of 0.1 without a seal -sealed-> 1 -plain bytes gone from disk-> 2
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from edge_agent.errors import StalledError, TransientError

BUSY_TIMEOUT_S = 10  # another process may be in the middle of a commit on slow flash
RESERVE_BYTES = 256 * 1024  # of a full disk: what a deletion writes before it gives room back
PAGE_BYTES = 4096
_SEALED, _CLEAN = 1, 2
_TABLES = (
    """CREATE TABLE records (
        row INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, kept_s INTEGER NOT NULL, sealed BLOB NOT NULL
    )""",
    "CREATE INDEX by_age ON records (kept_s)",
    "CREATE TABLE key (checked BLOB NOT NULL)",
)

SealRow = Callable[[sqlite3.Row], tuple[int, str, int, bytes]]


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection to the file at `path`, made if it is not there, readable by its owner only.

    Raises:
        StalledError: It cannot be opened, or is no database.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        pragmas = ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON")
        for pragma in pragmas:
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
                connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", map(seal, rows))
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


class Reserve:
    """A file that takes up room, to be lent to a deletion on a full disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def beside(cls, path: Path) -> Self:
        """Return the one of the database at `path`."""
        return cls(path.with_name(f"{path.name}.reserve"))

    def grow(self, size_bytes: int) -> None:
        """Have at least `size_bytes`; raises OSError if the disk has no such room."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if os.fstat(descriptor).st_size < size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def lend(self) -> Iterator[int]:
        """Give the room away for a while; yields how many bytes are free now."""
        size_bytes = RESERVE_BYTES
        with contextlib.suppress(FileNotFoundError):
            size_bytes = self._path.stat().st_size
            self._path.unlink()
        try:
            disk = os.statvfs(self._path.parent)
            yield disk.f_bavail * disk.f_frsize
        finally:
            with contextlib.suppress(OSError):  # the next sample asks for it again
                self.grow(size_bytes)


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
