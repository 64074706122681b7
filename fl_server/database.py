"""How the coordinator's SQLite files are opened: durable, and shared with operators' commands."""

import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Self

BUSY_TIMEOUT_S = 10.0  # another command holds the write lock for milliseconds


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Return a connection in WAL mode whose commits survive a power cut; `schema` must be repeatable."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.executescript(schema)
    return connection


class Database:
    """Tables in a file; a context, of the thread that opened it."""

    def __init__(self, path: Path, schema: str) -> None:
        self._database = open_database(path, schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()
