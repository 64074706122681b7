"""What the device has said, on disk until it is known to have arrived: at least once, or counted as dropped."""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edge_agent.errors import StalledError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    said_s REAL NOT NULL,
    payload BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS totals (dropped INTEGER NOT NULL);
INSERT INTO totals SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM totals);
"""


class Kind(StrEnum):
    """Of what is said: telemetry gives way to events."""

    EVENT = "event"
    TELEMETRY = "telemetry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One message.

    Attributes:
        said_s: Unix time, s.
        position: In the queue; counts up, given when it is kept.
    """

    id: str
    kind: Kind
    said_s: float
    payload: bytes
    position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much is kept.

    Attributes:
        max_bytes: Of all payloads; the oldest telemetry goes first, then the oldest events.
        telemetry_max_age_s: After which telemetry tells nothing any more.
    """

    max_bytes: int
    telemetry_max_age_s: float


class Outbox:
    """A bounded queue in one SQLite file; used by one thread at a time.

    Attributes:
        events: That wait.
        dropped: Items lost, to the bounds since the file was made, and to a disk that takes none since the start.
    """

    def __init__(self, connection: sqlite3.Connection, bounds: Bounds) -> None:
        self._connection = connection
        self._bounds = bounds
        self.dropped = int(connection.execute("SELECT dropped FROM totals").fetchone()[0])
        self.events = self._count_events()

    def put(self, items: Sequence[Item], *, now_s: float) -> bool:
        """Keep `items`, all or none, until they are removed; durable on return. False if the disk takes none."""
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO items (id, kind, said_s, payload) VALUES (?, ?, ?, ?)",
                    [(item.id, item.kind, item.said_s, item.payload) for item in items],
                )
                dropped = self._make_room(now_s)
                if dropped:
                    self._connection.execute("UPDATE totals SET dropped = dropped + ?", (dropped,))
        except sqlite3.Error:  # serving goes on without a diary
            self.dropped += len(items)
            return False
        self.dropped += dropped
        self.events = self._count_events()
        return True

    def remove(self, ids: Iterable[str]) -> None:
        """Forget what has arrived; ids that are not here are ignored."""
        try:
            with self._connection:
                self._connection.executemany("DELETE FROM items WHERE id = ?", [(name,) for name in ids])
        except sqlite3.Error:  # they are sent again, and a reader de-duplicates by id
            return
        self.events = self._count_events()

    def load(self, *, after: int = 0, limit: int = -1) -> list[Item]:
        """Return what waits behind position `after`, oldest first; all of it if `limit` is negative."""
        return self._load("position > ?", after, limit)

    def load_events(self, *, up_to: int, limit: int) -> list[Item]:
        """Return the oldest events that wait at or before position `up_to`."""
        return self._load("kind = 'event' AND position <= ?", up_to, limit)

    def close(self) -> None:
        self._connection.close()

    def _load(self, condition: str, position: int, limit: int) -> list[Item]:
        query = f"SELECT id, kind, said_s, payload, position FROM items WHERE {condition} ORDER BY position LIMIT ?"  # noqa: S608 - constants
        try:
            rows = self._connection.execute(query, (position, limit)).fetchall()
        except sqlite3.Error:
            return []
        return [
            Item(id=name, kind=Kind(kind), said_s=said_s, payload=payload, position=found)
            for name, kind, said_s, payload, found in rows
        ]

    def _make_room(self, now_s: float) -> int:
        """Return how many items went."""
        oldest_s = now_s - self._bounds.telemetry_max_age_s
        dropped = self._connection.execute(
            "DELETE FROM items WHERE kind = 'telemetry' AND said_s < ?", (oldest_s,)
        ).rowcount
        (has_bytes,) = self._connection.execute("SELECT coalesce(sum(length(payload)), 0) FROM items").fetchone()
        surplus, going = has_bytes - self._bounds.max_bytes, list[tuple[int]]()
        rows = self._connection.execute("SELECT position, length(payload) FROM items ORDER BY kind = 'event', position")
        while surplus > 0:
            position, size = rows.fetchone()
            going.append((position,))
            surplus -= size
        self._connection.executemany("DELETE FROM items WHERE position = ?", going)
        return dropped + len(going)

    def _count_events(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM items WHERE kind = 'event'").fetchone()[0])


def open_outbox(path: Path, bounds: Bounds) -> Outbox:
    """Return the outbox at `path`, made if it is not there; raises StalledError."""
    try:
        connection = sqlite3.connect(path, check_same_thread=False)  # one thread at a time, but not always this one
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(_SCHEMA)
        return Outbox(connection, bounds)
    except sqlite3.Error as error:
        raise StalledError(f"{path}: {error}") from error
