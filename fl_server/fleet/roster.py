"""The roster: which devices are enrolled, what they last said, and what happened on them.

One SQLite file, shared by the running coordinator and operators' commands.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from fl_server.database import open_database
from fl_server.errors import ServerError
from models.contract.encoding import build_json, parse_json
from models.contract.ledger import SPENT_MAX, LedgerHead, Spent, add_up, take_larger
from models.contract.messages import Event, Status, Telemetry

EVENTS_KEPT = 1000  # of each device; older ones go

_SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    device_id TEXT PRIMARY KEY,
    public_key BLOB NOT NULL,
    node_id TEXT,           -- Flower's are unsigned 64 bits, SQLite's integers are not
    enrolled_at REAL NOT NULL,
    revoked_at REAL,
    status BLOB,
    telemetry BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY,
    device_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    received_at REAL NOT NULL,
    event BLOB NOT NULL,
    UNIQUE (device_id, event_id)
) STRICT;
CREATE TABLE IF NOT EXISTS ledgers (  -- what each device has spent at least
    device_id TEXT PRIMARY KEY,
    head BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS reported (  -- up to which round of a run a device has reported its ledger
    device_id TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    PRIMARY KEY (device_id, run)
) STRICT;
CREATE TABLE IF NOT EXISTS updates (  -- that came, whatever became of them, and what each cost its device
    device_id TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    spent BLOB NOT NULL,
    PRIMARY KEY (device_id, run, round)
) STRICT;
"""


class RosterError(ServerError):
    """The roster cannot take this: a name is not allowed, taken or unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One enrolled device.

    Attributes:
        public_key: Of its Flower node, OpenSSH format.
        node_id: As the SuperLink registered it; None until then, and once it has unregistered a revoked device.
        enrolled_at: Unix time, s.
        revoked_at: Unix time, s, from which it takes part in nothing.
        status: The last it said, if it ever did; `telemetry` likewise.
    """

    device_id: str
    public_key: bytes
    node_id: int | None
    enrolled_at: float
    revoked_at: float | None
    status: Status | None
    telemetry: Telemetry | None

    @property
    def may_train(self) -> bool:
        """Whether a run may wake it now."""
        return self.revoked_at is None and self.status is not None and self.status.online and self.status.trains


class Roster:
    """The enrolled devices on disk; every method returns once its effect is durable, in a batch once that ends."""

    def __init__(self, path: Path) -> None:
        self._database = open_database(path, _SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make all changes of the block durable together at its end, and none of them if it raises."""
        with self._changing():
            yield

    @contextmanager
    def enrolling(self, device_id: str, public_key: bytes) -> Iterator[None]:
        """Enrol the device if the block ends well, and not at all if it raises.

        Raises:
            RosterError: It is enrolled already.
        """
        with self._changing():
            if self._database.execute("SELECT 1 FROM devices WHERE device_id = ?", (device_id,)).fetchone():
                raise RosterError(f"device {device_id!r} is enrolled already; choose another id")
            self._database.execute(
                "INSERT INTO devices (device_id, public_key, enrolled_at) VALUES (?, ?, ?)",
                (device_id, public_key, time.time()),
            )
            yield

    def list_devices(self) -> list[Device]:
        """Return all devices, by id."""
        rows = self._database.execute("SELECT * FROM devices ORDER BY device_id")
        return [
            Device(
                device_id=row["device_id"],
                public_key=row["public_key"],
                node_id=None if row["node_id"] is None else int(row["node_id"]),
                enrolled_at=row["enrolled_at"],
                revoked_at=row["revoked_at"],
                status=None if row["status"] is None else parse_json(row["status"], Status),
                telemetry=None if row["telemetry"] is None else parse_json(row["telemetry"], Telemetry),
            )
            for row in rows
        ]

    def is_member(self, device_id: str) -> bool:
        """Return whether the device is enrolled and not revoked."""
        query = "SELECT 1 FROM devices WHERE device_id = ? AND revoked_at IS NULL"
        return self._database.execute(query, (device_id,)).fetchone() is not None

    def revoke(self, device_id: str) -> None:
        """Exclude the device from now on.

        Raises:
            RosterError: No such member.
        """
        query = "UPDATE devices SET revoked_at = ? WHERE device_id = ? AND revoked_at IS NULL"
        if not self._database.execute(query, (time.time(), device_id)).rowcount:
            raise RosterError(f"device {device_id!r} is not enrolled; see fl-server devices")

    def save_node_id(self, device_id: str, node_id: int | None) -> None:
        text = None if node_id is None else str(node_id)
        self._database.execute("UPDATE devices SET node_id = ? WHERE device_id = ?", (text, device_id))

    def save_status(self, device_id: str, status: Status) -> Status | None:
        """Keep what the device says of itself, and return what it said before."""
        row = self._database.execute("SELECT status FROM devices WHERE device_id = ?", (device_id,)).fetchone()
        self._database.execute("UPDATE devices SET status = ? WHERE device_id = ?", (build_json(status), device_id))
        return None if row is None or row["status"] is None else parse_json(row["status"], Status)

    def save_telemetry(self, device_id: str, telemetry: Telemetry) -> None:
        """Keep the device's last measurements."""
        self._database.execute(
            "UPDATE devices SET telemetry = ? WHERE device_id = ?", (build_json(telemetry), device_id)
        )

    def save_event(self, device_id: str, event: Event) -> bool:
        """Keep the event; return False if it was here already, as a repeated delivery is."""
        added = self._database.execute(
            "INSERT OR IGNORE INTO events (device_id, event_id, received_at, event) VALUES (?, ?, ?, ?)",
            (device_id, event.id, time.time(), build_json(event)),
        )
        if not added.rowcount:
            return False
        self._database.execute(
            "DELETE FROM events WHERE device_id = ? AND number <= "
            "(SELECT number FROM events WHERE device_id = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (device_id, device_id, EVENTS_KEPT),
        )
        return True

    def list_events(self, device_id: str) -> list[Event]:
        """Return the device's last events, oldest first."""
        rows = self._database.execute("SELECT event FROM events WHERE device_id = ? ORDER BY number", (device_id,))
        return [parse_json(row["event"], Event) for row in rows]

    def save_ledger(self, device_id: str, head: LedgerHead, *, run: str, round_number: int) -> None:
        """Keep what the device says of its privacy ledger; of what was known before, the larger spend stays.

        Args:
            device_id: Who says it.
            head: Of its ledger, which holds all that it ever spent up to the round.
            run: The run it was in then.
            round_number: The last round of the run that it had charged; 0 before the first.

        Raises:
            RosterError: More than a copy can hold.
        """
        with self._changing():
            later = self._database.execute(
                "SELECT spent FROM updates WHERE device_id = ? AND run = ? AND round > ?",
                (device_id, run, round_number),
            )
            spent = add_up([*head.spent, *(parse_json(row["spent"], Spent) for row in later)])
            known = self.get_ledger(device_id)
            newest = max(known, head, key=lambda ledger: ledger.entries)
            self._put_ledger(device_id, newest, take_larger(known.spent, spent))
            self._database.execute(
                "INSERT INTO reported VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET round = max(round, excluded.round)",
                (device_id, run, round_number),
            )

    def save_update(self, device_id: str, run: str, round_number: int, spent: Spent) -> None:
        """Keep that an update of the device was seen, which it must have paid for: once, if it has not said so itself.

        Raises:
            RosterError: More than a copy can hold.
        """
        with self._changing():
            row = (device_id, run, round_number)
            if not self._database.execute(
                "INSERT OR IGNORE INTO updates VALUES (?, ?, ?, ?)", (*row, build_json(spent))
            ).rowcount:
                return
            query = "SELECT 1 FROM reported WHERE device_id = ? AND run = ? AND round >= ?"
            if self._database.execute(query, row).fetchone() is None:
                known = self.get_ledger(device_id)
                self._put_ledger(device_id, known, add_up([*known.spent, spent]))

    def get_ledger(self, device_id: str) -> LedgerHead:
        """Return what the device has spent at least; the head is that of the longest ledger that it reported."""
        row = self._database.execute("SELECT head FROM ledgers WHERE device_id = ?", (device_id,)).fetchone()
        return LedgerHead() if row is None else parse_json(row["head"], LedgerHead)

    def _put_ledger(self, device_id: str, head: LedgerHead, spent: tuple[Spent, ...]) -> None:
        if len(spent) > SPENT_MAX:
            raise RosterError(f"{len(spent)} kinds of steps in the ledger of {device_id}, at most {SPENT_MAX} are kept")
        self._database.execute(
            "INSERT OR REPLACE INTO ledgers VALUES (?, ?)", (device_id, build_json(replace(head, spent=spent)))
        )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        is_whole = not self._database.in_transaction  # else a part of one, undone alone
        self._database.execute("BEGIN IMMEDIATE" if is_whole else "SAVEPOINT part")
        try:
            yield
        except BaseException:
            for undo in ("ROLLBACK",) if is_whole else ("ROLLBACK TO part", "RELEASE part"):
                self._database.execute(undo)
            raise
        self._database.execute("COMMIT" if is_whole else "RELEASE part")
