"""What a device tells its owner, on its Unix socket: how it is, and what training has cost in privacy."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from edge_agent.config import AgentSettings, PrivacySettings
from models.contract.encoding import parse_json
from models.contract.privacy import Unit

if TYPE_CHECKING:
    from edge_agent.training.budget import Entry

LINES_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerStatus:
    """How the device is.

    Attributes:
        ready: Whether a model answers.
        connected: Whether the broker has accepted this device.
        training: The run that a training process is working for.
        samples: How many the device keeps; None if their file cannot be opened.
        unsent_events: Not acknowledged by the coordinator yet.
        ignored_messages: That were not what their topic says.
        dropped_messages: Telemetry and events lost, to a full queue or a broker that was away.
    """

    device_id: str
    fleet: str
    agent: str
    model: str
    version: int | None
    slot: Literal["a", "b"] | None
    ready: bool
    update: str
    connected: bool
    training: str | None
    samples: int | None
    unsent_events: int
    ignored_messages: int
    dropped_messages: int
    uptime_s: float
    rss_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpend:
    """What training one model has cost so far; `epsilon` at the owner's delta, over all runs.

    Attributes:
        left: Of the owner's limit; what a run costs does not add to what is spent, it adds less.
        restored: Entries of the ledger that were taken from the coordinator's copy.
    """

    model: str
    epsilon: Decimal
    left: Decimal
    runs: int
    rounds: int
    restored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLine:
    """One of the ledger's last entries, as the ledger has it.

    Attributes:
        at: Unix time, s.
        run: None if it was taken from the coordinator's copy, as `round`.
        epsilon_before: Of the model, at the delta that the owner had then; `epsilon_after` likewise.
    """

    at: int
    model: str
    run: str | None
    round: int | None
    sampling_rate: Decimal
    noise_multiplier: Decimal
    steps: int
    epsilon_before: Decimal
    epsilon_after: Decimal
    unit: Unit = Unit.SAMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyReport:
    """The ledger and the owner's limits.

    Attributes:
        total_epsilon: Of all models together, over the device's lifetime.
        total_left: Of the owner's limit for all models together.
        trusts_coordinator: Whether runs may have an update before there is noise on it.
        last: The newest entries, oldest first.
    """

    epsilon_limit: Decimal
    total_epsilon_limit: Decimal
    noise_multiplier_limit: Decimal
    delta: Decimal
    total_epsilon: Decimal
    total_left: Decimal
    spent: tuple[ModelSpend, ...]
    last: tuple[LedgerLine, ...]
    trusts_coordinator: bool = False


def load_privacy_report(settings: AgentSettings) -> PrivacyReport:
    """Return what the ledger on disk says; raises StalledError if it is damaged."""
    return build_report(load_entries(settings), settings.privacy)


def load_entries(settings: AgentSettings) -> "tuple[Entry, ...]":
    """Return the entries of the ledger on disk, oldest first; raises StalledError if it is damaged."""
    # Here, since only an owner who asks needs the accountant.
    from edge_agent.training.ledger import parse_ledger

    try:
        data = (settings.training_dir / "ledger.jsonl").read_bytes()
    except FileNotFoundError:
        data = b""
    whole_lines = data[: data.rfind(b"\n") + 1]  # the training process may be writing one
    return parse_ledger(whole_lines)[0]


def parse_privacy_report(data: bytes) -> PrivacyReport:
    """Return the report in `data`; raises MalformedError."""
    return parse_json(data, PrivacyReport)


def build_privacy_text(report: PrivacyReport) -> str:
    """Return `report` in plain words."""
    lines = [
        f"{spend.model}: epsilon {spend.epsilon:f} of {report.epsilon_limit:f} is spent, {spend.left:f} is left, "
        f"at delta {report.delta:f}, in {spend.rounds} rounds of {spend.runs} runs{_describe_restored(spend)}."
        for spend in report.spent
    ]
    if lines:
        lines.append(
            f"All models together, over this device's lifetime: epsilon {report.total_epsilon:f} of "
            f"{report.total_epsilon_limit:f} is spent, {report.total_left:f} is left."
        )
        lines += ["The last entries of the ledger:", *map(_describe_line, report.last)]
    else:
        lines.append(
            f"Nothing is spent: this device's ledger is empty. Its limit is epsilon {report.epsilon_limit:f} for a "
            f"model, {report.total_epsilon_limit:f} for all together."
        )
        lines.append("Before it trains, the coordinator must say what this device spent before, if it ever did.")
    if report.noise_multiplier_limit > 0:
        lines.append(f"Runs with a noise multiplier below {report.noise_multiplier_limit:f} are refused.")
    if report.trusts_coordinator:
        lines.append(
            "You trust the coordinator: in runs of the privacy unit 'device' it sees your clipped update, and adds the "
            "noise to the sum of many. Such a run is charged as a whole, with its first round here."
        )
    lines += [
        "Your samples stay on this device. What leaves it is noise added to the sum of many clipped contributions:",
        "the smaller epsilon, the less anyone who sees it can tell whether one given sample was among yours.",
        "A person with k samples here loses more than k times as much. A round that would cross a limit is refused.",
        "What is spent never comes back: limits are for the device's lifetime, not for a month or a year.",
    ]
    return "\n".join(lines)


def _describe_restored(spend: ModelSpend) -> str:
    return f", {spend.restored} entries as the coordinator remembered them" if spend.restored else ""


def _describe_line(line: LedgerLine) -> str:
    when = dt.datetime.fromtimestamp(line.at, dt.UTC).strftime("%Y-%m-%d %H:%M")
    what = "the coordinator's copy" if line.run is None else f"round {line.round} of run {line.run}"
    return (
        f"  {when} UTC  {line.model}, {what}: {_describe_steps(line)}, sampling rate {line.sampling_rate:f}, "
        f"noise {line.noise_multiplier:f}, epsilon {line.epsilon_before:f} -> {line.epsilon_after:f}"
    )


def _describe_steps(line: LedgerLine) -> str:
    if line.unit is Unit.SAMPLE:
        return f"{line.steps} steps"
    return f"unit device, all {line.steps} rounds of the run" if line.steps else "unit device, already paid"


def build_report(entries: "Sequence[Entry]", limits: PrivacySettings) -> PrivacyReport:
    """Return what `entries`, oldest first, come to under the owner's `limits`."""
    from edge_agent.training.budget import compute_total

    spent = []
    for model, group in groupby(sorted(entries, key=lambda entry: entry.model), key=lambda entry: entry.model):
        own = list(group)
        rounds = {(entry.run, entry.round) for entry in own if entry.restored_from is None}
        epsilon = compute_total(own, limits.delta)
        spent.append(
            ModelSpend(
                model=model,
                epsilon=epsilon,
                left=max(Decimal(0), limits.epsilon_limit - epsilon),
                runs=len({run for run, _ in rounds}),
                rounds=len(rounds),
                restored=sum(entry.restored_from is not None for entry in own),
            )
        )
    total = compute_total(entries, limits.delta)
    return PrivacyReport(
        epsilon_limit=limits.epsilon_limit,
        total_epsilon_limit=limits.total_limit,
        noise_multiplier_limit=limits.noise_multiplier_limit,
        delta=limits.delta,
        total_epsilon=total,
        total_left=max(Decimal(0), limits.total_limit - total),
        spent=tuple(spent),
        last=tuple(map(_build_line, entries[-LINES_SHOWN:])),
        trusts_coordinator=limits.trust_coordinator,
    )


def _build_line(entry: "Entry") -> LedgerLine:
    is_spend = entry.restored_from is None
    return LedgerLine(
        at=entry.at,
        model=entry.model,
        run=entry.run if is_spend else None,
        round=entry.round if is_spend else None,
        sampling_rate=entry.sampling_rate,
        noise_multiplier=entry.noise_multiplier,
        steps=entry.steps,
        epsilon_before=entry.epsilon_before,
        epsilon_after=entry.epsilon_after,
        unit=entry.unit,
    )
