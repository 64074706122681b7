"""What a device tells its owner, on its Unix socket: how it is, and what training has cost in privacy."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from edge_agent.config import AgentSettings, PrivacySettings
from models.contract.encoding import parse_json

if TYPE_CHECKING:
    from edge_agent.training.ledger import Entry


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
    """What training one model has cost so far; `epsilon` at the owner's delta, over all runs."""

    model: str
    epsilon: Decimal
    runs: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyReport:
    """The ledger and the owner's limits."""

    epsilon_limit: Decimal
    noise_multiplier_limit: Decimal
    delta: Decimal
    spent: tuple[ModelSpend, ...]


def load_privacy_report(settings: AgentSettings) -> PrivacyReport:
    """Return what the ledger on disk says; raises StalledError if it is damaged."""
    # Here, since only an owner who asks needs the accountant.
    from edge_agent.training.ledger import parse_ledger

    try:
        data = (settings.training_dir / "ledger.jsonl").read_bytes()
    except FileNotFoundError:
        data = b""
    whole_lines = data[: data.rfind(b"\n") + 1]  # the training process may be writing one
    return _build_report(parse_ledger(whole_lines)[0], settings.privacy)


def parse_privacy_report(data: bytes) -> PrivacyReport:
    """Return the report in `data`; raises MalformedError."""
    return parse_json(data, PrivacyReport)


def build_privacy_text(report: PrivacyReport) -> str:
    """Return `report` in plain words."""
    lines = [
        f"{spend.model}: epsilon {spend.epsilon:f} of {report.epsilon_limit:f} is spent, at delta {report.delta:f}, "
        f"in {spend.rounds} rounds of {spend.runs} runs."
        for spend in report.spent
    ] or [f"Nothing is spent: this device has not trained yet. Its limit is epsilon {report.epsilon_limit:f}."]
    if report.noise_multiplier_limit > 0:
        lines.append(f"Runs with a noise multiplier below {report.noise_multiplier_limit:f} are refused.")
    lines += [
        "Your samples stay on this device. What leaves it is noise added to the sum of many clipped contributions:",
        "the smaller epsilon, the less anyone who sees it can tell whether one given sample was among yours.",
        "A person with k samples here loses more than k times as much. A run that would cross the limit is refused.",
    ]
    return "\n".join(lines)


def _build_report(entries: "Iterable[Entry]", limits: PrivacySettings) -> PrivacyReport:
    from edge_agent.training.ledger import compute_total

    spent = []
    for model, group in groupby(sorted(entries, key=lambda entry: entry.model), key=lambda entry: entry.model):
        own = list(group)
        spent.append(
            ModelSpend(
                model=model,
                epsilon=compute_total(own, limits.delta),
                runs=len({entry.run for entry in own}),
                rounds=len({(entry.run, entry.round) for entry in own}),
            )
        )
    return PrivacyReport(
        epsilon_limit=limits.epsilon_limit,
        noise_multiplier_limit=limits.noise_multiplier_limit,
        delta=limits.delta,
        spent=tuple(spent),
    )
