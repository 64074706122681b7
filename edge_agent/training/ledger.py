"""What this device has spent of its owner's privacy: an append-only, hash-chained file of JSON lines.

A spend is on the disk before anything that it pays for may leave: at every crash the ledger's epsilon is
at least the true one. A last line without its newline was never promised to anybody and is cut off; any
other damage stops training until a person looks. A ledger that is absent, as after a reinstall, is taken from
the coordinator's copy: without one nothing is charged, and so nothing trained.
"""

import errno
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from edge_agent.errors import StalledError, TransientError
from edge_agent.training.budget import Entry, Limits, Spend, compute_total, count_spent, decide_spend, settle
from models.contract.encoding import build_canonical, build_digest, build_json, parse_json
from models.contract.errors import MalformedError
from models.contract.files import sync_directory
from models.contract.ledger import FIRST_PREVIOUS, LedgerHead, find_missing


class NoCopyError(StalledError):
    """The ledger is absent or not whole, and nobody says what this device has spent before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """An entry as it was written, and its digest: without it nothing would vouch for the last line."""

    digest: str
    entry: msgspec.Raw


class Ledger:
    """An open ledger; no other process has it open."""

    def __init__(self, descriptor: int, entries: Sequence[Entry], previous: str) -> None:
        self._descriptor: int | None = descriptor
        self._entries = list(entries)
        self._previous = previous
        self._is_whole = bool(entries) and not entries[-1].restored_left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All that was ever spent, oldest first."""
        return tuple(self._entries)

    @property
    def head(self) -> LedgerHead:
        """What it comes to."""
        return LedgerHead(entries=len(self._entries), digest=self._previous, spent=count_spent(self._entries))

    def spend(self, spend: Spend, limits: Limits, *, at: int) -> Entry:
        """Charge what is due of `spend`; the entry is durable on return.

        Raises:
            BudgetError: A limit would be crossed; nothing was charged.
            NoCopyError: What was spent before is not known.
            StalledError: The file cannot be written.
        """
        self._check_whole()
        due = settle(self._entries, spend)
        before, after = decide_spend(self._entries, due, limits)
        return self._add(
            Entry(
                sequence=len(self._entries) + 1,
                at=at,
                order_sequence=spend.order_sequence,
                model=spend.model,
                run=spend.run,
                round=spend.round,
                unit=spend.privacy.unit,
                sampling_rate=spend.sampling_rate,
                noise_multiplier=spend.privacy.noise_multiplier,
                steps=due.steps,
                delta=limits.delta,
                epsilon_before=before,
                epsilon_after=after,
                previous=self._previous,
            )
        )

    def restore(self, copy: LedgerHead | None, delta: Decimal, *, at: int) -> int:
        """Charge what the coordinator's `copy` holds beyond this ledger: the larger spend wins.

        Args:
            copy: None if the coordinator says nothing.
            delta: The owner's, at which the epsilons of the entries are stated.
            at: Unix time, s.

        Returns:
            How many entries were added, durable on return.

        Raises:
            NoCopyError: There is no copy, and this ledger does not say what was spent before.
            StalledError: The file cannot be written.
        """
        if copy is None:
            self._check_whole()
            return 0
        missing = find_missing(copy.spent, count_spent(self._entries))
        for left, spent in zip(reversed(range(len(missing))), missing, strict=True):
            of_model = [other for other in self._entries if other.model == spent.model]
            entry = Entry(
                sequence=len(self._entries) + 1,
                at=at,
                order_sequence=0,
                model=spent.model,
                run="",
                round=0,
                sampling_rate=spent.sampling_rate,
                noise_multiplier=spent.noise_multiplier,
                steps=spent.steps,
                delta=delta,
                epsilon_before=compute_total(of_model, delta),
                epsilon_after=Decimal(0),
                previous=self._previous,
                restored_from=copy.digest,
                restored_left=left,
            )
            self._add(replace(entry, epsilon_after=compute_total([*of_model, entry], delta)))
        self._is_whole = True
        return len(missing)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _check_whole(self) -> None:
        if not self._is_whole:
            raise NoCopyError(
                "this device has no privacy ledger, and the coordinator has not said what it has spent before: "
                "after a reinstall it trains only with the coordinator's copy, so that no budget begins anew"
            )

    def _add(self, entry: Entry) -> Entry:
        raw = build_canonical(entry)
        digest = build_digest(raw)
        self._append(build_json(_Line(digest=digest, entry=msgspec.Raw(raw))) + b"\n")
        self._previous = digest
        self._entries.append(entry)
        return entry

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            raise StalledError("the privacy ledger is closed")
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            self.close()  # what is on the disk now is not known before it is read again
            raise StalledError(f"the privacy ledger cannot be written: {error.strerror}") from error


def open_ledger(path: Path) -> Ledger:
    """Return the ledger at `path`, made if it is not there.

    Raises:
        TransientError: Another process has it open.
        StalledError: It cannot be opened, or the chain is broken.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        data = path.read_bytes()
        promised = data[: data.rfind(b"\n") + 1]
        entries, previous = parse_ledger(promised)
        if len(promised) < len(data):
            os.ftruncate(descriptor, len(promised))
        os.fsync(descriptor)  # the last writer may have died before its own
        sync_directory(path.parent)
        return Ledger(descriptor, entries, previous)
    except BlockingIOError as error:
        os.close(descriptor)
        raise TransientError(f"{path} is in use by another training process") from error
    except OSError as error:
        os.close(descriptor)
        raise StalledError(f"{path}: {error.strerror}") from error
    except StalledError as error:
        os.close(descriptor)
        raise StalledError(f"{path}: {error}") from error


def parse_ledger(data: bytes) -> tuple[tuple[Entry, ...], str]:
    """Return the entries in `data`, whole lines, and the digest of the last.

    Raises:
        StalledError: A line is not what was written there.
    """
    entries: list[Entry] = []
    previous = FIRST_PREVIOUS
    for number, text in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            line = parse_json(text, _Line)
            entry = parse_json(bytes(line.entry), Entry)
        except MalformedError as error:
            raise StalledError(f"line {number} of the privacy ledger is damaged: {error}") from error
        if build_digest(bytes(line.entry)) != line.digest:
            raise StalledError(f"line {number} of the privacy ledger was altered")
        if entry.sequence != number or entry.previous != previous:
            raise StalledError(f"line {number} of the privacy ledger does not follow the one before it")
        entries.append(entry)
        previous = line.digest
    return tuple(entries), previous
