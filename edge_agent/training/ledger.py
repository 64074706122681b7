"""What this device has spent of its owner's privacy: an append-only, hash-chained file of JSON lines.

A spend is on the disk before anything that it pays for may leave: at every crash the ledger's epsilon is
at least the true one. A last line without its newline was never promised to anybody and is cut off; any
other damage stops training until a person looks.
"""

import errno
import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from edge_agent.errors import StalledError, TransientError
from edge_agent.training.accountant import Phase, compute_epsilon
from models.contract.encoding import build_canonical, build_digest, build_json, parse_json
from models.contract.errors import MalformedError
from models.contract.files import sync_directory
from models.contract.privacy import PrivacyPlan

_FIRST_PREVIOUS = build_digest(b"")
_UPWARDS = Context(prec=10, rounding=ROUND_CEILING)


class BudgetError(StalledError):
    """A spend would cross a limit: `asked` would be reached, `limit` is allowed."""

    def __init__(self, message: str, *, asked: Decimal, limit: Decimal) -> None:
        super().__init__(message)
        self.asked = asked
        self.limit = limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The owner's own, over any plan.

    Attributes:
        epsilon: Largest total of one model, over all runs.
        delta: At which that total is computed.
        noise_multiplier: Least z of any spend.
    """

    epsilon: Decimal
    delta: Decimal
    noise_multiplier: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What one round of a run asks for, and the sequence number of the order that asks."""

    order_sequence: int
    model: str
    run: str
    round: int
    privacy: PrivacyPlan
    steps: int

    @property
    def phase(self) -> Phase:
        """What the accountant needs of it."""
        return Phase(float(self.privacy.sampling_rate), float(self.privacy.noise_multiplier), self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger.

    Attributes:
        sequence: Counts up from 1.
        at: Unix time, s.
        order_sequence: Of the order that was acted on.
        delta: The owner's, at which both epsilons are stated, of all entries of the model up to here.
        previous: Digest of the entry before.
    """

    schema_version: Literal[1] = 1
    sequence: int
    at: int
    order_sequence: int
    model: str
    run: str
    round: int
    sampling_rate: Decimal
    noise_multiplier: Decimal
    steps: int
    delta: Decimal
    epsilon_before: Decimal
    epsilon_after: Decimal
    previous: str

    @property
    def phase(self) -> Phase:
        """What the accountant needs of it."""
        return Phase(float(self.sampling_rate), float(self.noise_multiplier), self.steps)


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

    def spend(self, spend: Spend, limits: Limits, *, at: int) -> Entry:
        """Charge `spend`; the entry is durable on return.

        Raises:
            BudgetError: A limit would be crossed; nothing was charged.
            StalledError: The file cannot be written.
        """
        before, after = decide_spend(self._entries, spend, limits)
        entry = Entry(
            sequence=len(self._entries) + 1,
            at=at,
            order_sequence=spend.order_sequence,
            model=spend.model,
            run=spend.run,
            round=spend.round,
            sampling_rate=spend.privacy.sampling_rate,
            noise_multiplier=spend.privacy.noise_multiplier,
            steps=spend.steps,
            delta=limits.delta,
            epsilon_before=before,
            epsilon_after=after,
            previous=self._previous,
        )
        raw = build_canonical(entry)
        digest = build_digest(raw)
        self._append(build_json(_Line(digest=digest, entry=msgspec.Raw(raw))) + b"\n")
        self._previous = digest
        self._entries.append(entry)
        return entry

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

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
    previous = _FIRST_PREVIOUS
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


def compute_total(spends: Iterable[Entry | Spend], delta: Decimal) -> Decimal:
    """Return the epsilon of all `spends` together at `delta`, rounded up."""
    return _UPWARDS.create_decimal_from_float(compute_epsilon([spend.phase for spend in spends], float(delta)))


def decide_spend(entries: Iterable[Entry], spend: Spend, limits: Limits) -> tuple[Decimal, Decimal]:
    """Return the model's total epsilon before and after `spend`, given all `entries`.

    Raises:
        BudgetError: It crosses the owner's limits, or what its plan allows the run.
    """
    privacy = spend.privacy
    of_model = [entry for entry in entries if entry.model == spend.model]
    of_run = [entry for entry in of_model if entry.run == spend.run]
    if privacy.noise_multiplier < limits.noise_multiplier:
        raise BudgetError(
            f"noise multiplier {privacy.noise_multiplier} is below the owner's least, {limits.noise_multiplier}",
            asked=privacy.noise_multiplier,
            limit=limits.noise_multiplier,
        )
    run_total = compute_total([*of_run, spend], privacy.delta)
    if run_total > privacy.epsilon:
        raise BudgetError(
            f"run {spend.run!r} would reach epsilon {run_total}, its plan allows {privacy.epsilon}",
            asked=run_total,
            limit=privacy.epsilon,
        )
    total = compute_total([*of_model, spend], limits.delta)
    if total > limits.epsilon:
        raise BudgetError(
            f"model {spend.model!r} would reach epsilon {total} in all, its owner allows {limits.epsilon}",
            asked=total,
            limit=limits.epsilon,
        )
    return compute_total(of_model, limits.delta), total
