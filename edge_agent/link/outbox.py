"""Events that the coordinator has not acknowledged, on disk: each arrives at least once or is counted as dropped."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from edge_agent.errors import StalledError

EVENTS_MAX = 1000  # at 16 kB an event 16 MB; the oldest goes first
_SCHEMA = "CREATE TABLE IF NOT EXISTS events (position INTEGER PRIMARY KEY, id TEXT UNIQUE, payload BLOB NOT NULL)"


class Outbox:
    """A bounded queue in one SQLite file; used by one thread.

    Attributes:
        dropped: Events lost since the start, to a full queue or a full disk.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.dropped = 0
        self._connection = connection

    def put(self, event_id: str, payload: bytes) -> None:
        """Keep an event until it is removed; durable on return, unless the disk is full."""
        try:
            with self._connection:
                self._connection.execute("INSERT INTO events (id, payload) VALUES (?, ?)", (event_id, payload))
                newest = "SELECT position FROM events ORDER BY position DESC LIMIT ?"
                cursor = self._connection.execute(
                    f"DELETE FROM events WHERE position NOT IN ({newest})",  # noqa: S608 - a constant
                    (EVENTS_MAX,),
                )
        except sqlite3.Error:  # serving goes on without a diary
            self.dropped += 1
        else:
            self.dropped += max(0, cursor.rowcount)

    def remove(self, event_ids: Sequence[str]) -> None:
        """Forget acknowledged events; ids that are not here are ignored."""
        try:
            with self._connection:
                self._connection.executemany("DELETE FROM events WHERE id = ?", [(name,) for name in event_ids])
        except sqlite3.Error:  # they are sent again, and a reader de-duplicates by id
            return

    def load_pending(self, limit: int = -1) -> list[bytes]:
        """Return what waits, oldest first; all of it if `limit` is negative."""
        try:
            rows = self._connection.execute("SELECT payload FROM events ORDER BY position LIMIT ?", (limit,)).fetchall()
        except sqlite3.Error:
            return []
        return [payload for (payload,) in rows]

    def count(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM events").fetchone()[0])

    def close(self) -> None:
        self._connection.close()


def open_outbox(path: Path) -> Outbox:
    """Return the outbox at `path`, made if it is not there; raises StalledError."""
    try:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(_SCHEMA)
    except sqlite3.Error as error:
        raise StalledError(f"{path}: {error}") from error
    return Outbox(connection)
