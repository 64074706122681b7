"""The roster: which devices are enrolled, what they last said, and what happened on them.

One SQLite file, shared by the running coordinator and operators' commands.
"""

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fl_server.database import Database
from fl_server.errors import ServerError
from models.contract.encoding import build_json, parse_json
from models.contract.ledger import SPENT_MAX, LedgerHead, Spent, add_up, take_larger
from models.contract.messages import Event, EventKind, Status, Telemetry

CERTIFICATES_MAX = 32  # of one device at a time; it needs two a year, and one for each answer that got lost
EVENTS_KEPT = 1000  # of each device; older ones go
WORDS_KEPT = 100  # of each device, on as many versions


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
CREATE TABLE IF NOT EXISTS certificates (  -- of devices
    serial TEXT PRIMARY KEY,  -- up to 160 bits
    device_id TEXT NOT NULL,
    not_after REAL NOT NULL,
    is_replaced INTEGER NOT NULL DEFAULT 0,  -- by those of a later enrolment: as good as revoked
    is_shut_out INTEGER NOT NULL DEFAULT 0  -- once the broker refuses it and has ended what it had open
) STRICT;
CREATE TABLE IF NOT EXISTS tokens (  -- with which machines enrol themselves
    digest TEXT PRIMARY KEY,
    device_id TEXT NOT NULL,
    model TEXT NOT NULL,
    expires_at REAL NOT NULL,
    again INTEGER NOT NULL,
    spent_at REAL
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY,
    device_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    received_at REAL NOT NULL,
    event BLOB NOT NULL,
    UNIQUE (device_id, event_id)
) STRICT;
CREATE TABLE IF NOT EXISTS last_words (  -- each device's last word on a version
    device_id TEXT NOT NULL,
    model TEXT NOT NULL,
    version INTEGER NOT NULL,
    number INTEGER NOT NULL,  -- of the event that said so
    has_failed INTEGER NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (device_id, model, version)
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
class DeviceCertificate:
    """One certificate issued to a device.

    Attributes:
        not_after: Unix time, s.
        is_shut_out: Whether the broker refuses it, and has ended its session.
    """

    device_id: str
    serial: int
    not_after: float
    is_shut_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """Whom a token is for."""

    device_id: str
    model: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWord:
    """A device's last word on a version: that it serves, or that it failed, and why."""

    device_id: str
    has_failed: bool
    message: str


class Roster(Database):
    """The enrolled devices on disk; every method returns once its effect is durable, in a batch once that ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _SCHEMA)

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
            if self._has(device_id):
                raise RosterError(f"device {device_id!r} is enrolled already; choose another id")
            self._add(device_id, public_key)
            yield

    def add_token(self, digest: str, *, device_id: str, model: str, expires_at: float, again: bool) -> None:
        """Keep a token by its digest; unspent ones of the device are none any more.

        Raises:
            RosterError: The id is taken, or is not although the token is to enrol it `again`.
        """
        with self._changing():
            self._check_may_enrol(device_id, again=again)
            self._database.execute("DELETE FROM tokens WHERE device_id = ? AND spent_at IS NULL", (device_id,))
            self._database.execute(
                "INSERT INTO tokens (digest, device_id, model, expires_at, again) VALUES (?, ?, ?, ?, ?)",
                (digest, device_id, model, expires_at, again),
            )

    @contextmanager
    def redeeming(self, digest: str, public_key: bytes) -> Iterator[Newcomer]:
        """Spend a token and enrol its device if the block ends well, and neither if it raises.

        A device that was enrolled before keeps its id and what it has spent; its earlier certificates are revoked.

        Raises:
            RosterError: There is no such token, it is spent or expired, or its device or the key is enrolled by now.
        """
        with self._changing():
            row = self._database.execute("SELECT * FROM tokens WHERE digest = ?", (digest,)).fetchone()
            if row is None:
                raise RosterError("this token is not valid here; ask the operator for one")
            if row["spent_at"] is not None:
                raise RosterError("this token was used already; ask the operator for another, made with --again")
            if row["expires_at"] <= time.time():
                raise RosterError("this token has expired; ask the operator for another")
            device_id = row["device_id"]
            self._check_may_enrol(device_id, again=bool(row["again"]))
            if self._database.execute("SELECT 1 FROM devices WHERE public_key = ?", (public_key,)).fetchone():
                raise RosterError("a device has this node key already; each makes its own")
            self._database.execute("UPDATE tokens SET spent_at = ? WHERE digest = ?", (time.time(), digest))
            self._database.execute("UPDATE certificates SET is_replaced = 1 WHERE device_id = ?", (device_id,))
            self._add(device_id, public_key)
            yield Newcomer(device_id=device_id, model=row["model"])

    def has_certificate(self, device_id: str, serial: int) -> bool:
        """Return whether the device is a member and the certificate is one of its present ones."""
        query = "SELECT 1 FROM certificates WHERE serial = ? AND device_id = ? AND NOT is_replaced"
        is_its_own = self._database.execute(query, (str(serial), device_id)).fetchone() is not None
        return is_its_own and self.is_member(device_id)

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
        """Exclude the device from now on; tokens that were made for it before are worth nothing more.

        Raises:
            RosterError: No such member.
        """
        query = "UPDATE devices SET revoked_at = ? WHERE device_id = ? AND revoked_at IS NULL"
        with self._changing():
            if not self._database.execute(query, (time.time(), device_id)).rowcount:
                raise RosterError(f"device {device_id!r} is not enrolled; see fl-server devices")
            self._database.execute("DELETE FROM tokens WHERE device_id = ? AND spent_at IS NULL", (device_id,))

    def save_certificate(self, device_id: str, serial: int, not_after: float) -> None:
        """Keep that the certificate was issued to the device, which may have several until the older ones end.

        Raises:
            RosterError: No such member, or it has so many that the list of revoked ones would grow for no reason.
        """
        query = "SELECT count(*) FROM certificates WHERE device_id = ? AND not_after > ?"
        (valid,) = self._database.execute(query, (device_id, time.time())).fetchone()
        if valid >= CERTIFICATES_MAX:
            raise RosterError(f"device {device_id!r} has {valid} certificates that are valid; no more are issued")
        added = self._database.execute(
            "INSERT INTO certificates (serial, device_id, not_after) "
            "SELECT ?, device_id, ? FROM devices WHERE device_id = ? AND revoked_at IS NULL",
            (str(serial), not_after, device_id),
        )
        if not added.rowcount:
            raise RosterError(f"device {device_id!r} is not enrolled; see fl-server devices")

    def list_certificates(self, device_id: str) -> list[DeviceCertificate]:
        """Return what was issued to the device, the one that ends last first."""
        rows = self._database.execute(
            "SELECT * FROM certificates WHERE device_id = ? ORDER BY not_after DESC", (device_id,)
        )
        return [_read_certificate(row) for row in rows]

    def list_revoked_certificates(self) -> list[DeviceCertificate]:
        """Return what revoked devices have, or members had before they enrolled again, that has not ended by itself."""
        rows = self._database.execute(
            "SELECT certificates.* FROM certificates JOIN devices USING (device_id) "
            "WHERE (revoked_at IS NOT NULL OR is_replaced) AND not_after > ? ORDER BY device_id",
            (time.time(),),
        )
        return [_read_certificate(row) for row in rows]

    def save_shut_out(self, serials: Iterable[int]) -> None:
        """Keep that the broker refuses these certificates, and has ended what was open with them."""
        with self._changing():
            self._database.executemany(
                "UPDATE certificates SET is_shut_out = 1 WHERE serial = ?", [(str(serial),) for serial in serials]
            )

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

    def forget_telemetry(self, model: str, version: int) -> None:
        """Forget what devices measured of this version so far; what they send from now on counts."""
        self._database.execute(
            "UPDATE devices SET telemetry = NULL WHERE json_extract(CAST(telemetry AS TEXT), '$.model') = ? "
            "AND json_extract(CAST(telemetry AS TEXT), '$.version') = ?",
            (model, version),
        )

    def save_event(self, device_id: str, event: Event) -> bool:
        """Keep the event, and what it says of a version; return False if it was here already, as a repeated delivery is."""
        with self._changing():
            added = self._database.execute(
                "INSERT OR IGNORE INTO events (device_id, event_id, received_at, event) VALUES (?, ?, ?, ?)",
                (device_id, event.id, time.time(), build_json(event)),
            )
            if not added.rowcount:
                return False
            if event.kind in (EventKind.UPDATED, EventKind.FAILED):
                assert added.lastrowid is not None
                self._keep_word(device_id, event, added.lastrowid)
            self._keep_newest("events", device_id, EVENTS_KEPT)
            return True

    def list_last_words(self, model: str, version: int, *, since: int = 0) -> list[LastWord]:
        """Return the last words of all members on the version, by device, that came after event `since`."""
        rows = self._database.execute(
            "SELECT device_id, has_failed, message FROM last_words JOIN devices USING (device_id) "
            "WHERE revoked_at IS NULL AND model = ? AND version = ? AND number > ? ORDER BY device_id",
            (model, version, since),
        )
        return [
            LastWord(device_id=row["device_id"], has_failed=bool(row["has_failed"]), message=row["message"])
            for row in rows
        ]

    def find_last_event(self) -> int:
        """Return the number of the last event that was kept, 0 before the first."""
        row = self._database.execute("SELECT max(number) AS last FROM events").fetchone()
        return row["last"] or 0

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
            spent = _add_up(device_id, [*head.spent, *(parse_json(row["spent"], Spent) for row in later)])
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
                self._put_ledger(device_id, known, _add_up(device_id, [*known.spent, spent]))

    def get_ledger(self, device_id: str) -> LedgerHead:
        """Return what the device has spent at least; the head is that of the longest ledger that it reported."""
        row = self._database.execute("SELECT head FROM ledgers WHERE device_id = ?", (device_id,)).fetchone()
        return LedgerHead() if row is None else parse_json(row["head"], LedgerHead)

    def _keep_word(self, device_id: str, event: Event, number: int) -> None:
        if event.model is None or not event.version:
            return
        self._database.execute(
            "INSERT OR REPLACE INTO last_words VALUES (?, ?, ?, ?, ?, ?)",
            (device_id, event.model, event.version, number, event.kind is EventKind.FAILED, event.message),
        )
        self._keep_newest("last_words", device_id, WORDS_KEPT)

    def _keep_newest(self, table: Literal["events", "last_words"], device_id: str, limit: int) -> None:
        self._database.execute(
            f"DELETE FROM {table} WHERE device_id = ?1 AND number <= "  # noqa: S608 - one of two names of our own
            f"(SELECT number FROM {table} WHERE device_id = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)",
            (device_id, limit),
        )

    def _put_ledger(self, device_id: str, head: LedgerHead, spent: tuple[Spent, ...]) -> None:
        if len(spent) > SPENT_MAX:
            raise RosterError(f"{len(spent)} kinds of steps in the ledger of {device_id}, at most {SPENT_MAX} are kept")
        self._database.execute(
            "INSERT OR REPLACE INTO ledgers VALUES (?, ?)", (device_id, build_json(replace(head, spent=spent)))
        )

    def _has(self, device_id: str) -> bool:
        query = "SELECT 1 FROM devices WHERE device_id = ?"
        return self._database.execute(query, (device_id,)).fetchone() is not None

    def _check_may_enrol(self, device_id: str, *, again: bool) -> None:
        if self._has(device_id) and not again:
            raise RosterError(f"device {device_id!r} is enrolled already; the operator can have it enrolled --again")
        if again and not self._has(device_id):
            raise RosterError(f"device {device_id!r} was never enrolled, so it cannot be --again")

    def _add(self, device_id: str, public_key: bytes) -> None:
        """Make it a member with this key; what it said before is of the machine that it was."""
        self._database.execute(
            "INSERT OR REPLACE INTO devices (device_id, public_key, enrolled_at) VALUES (?, ?, ?)",
            (device_id, public_key, time.time()),
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


def _add_up(device_id: str, spent: Iterable[Spent]) -> tuple[Spent, ...]:
    try:
        return add_up(spent)
    except ValueError as error:  # more steps than one number holds
        raise RosterError(f"the ledger of {device_id}: {error}") from error


def _read_certificate(row: sqlite3.Row) -> DeviceCertificate:
    return DeviceCertificate(
        device_id=row["device_id"],
        serial=int(row["serial"]),
        not_after=row["not_after"],
        is_shut_out=bool(row["is_shut_out"]),
    )
