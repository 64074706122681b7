"""What the agent tells its training process, and what that process says back.

One `TrainingJob` on stdin; one `TrainingEvent` a line on stdout.
"""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from models.contract.encoding import build_json, parse_json
from models.contract.ledger import LedgerHead
from models.contract.topics import check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One run that this device takes part in. Paths are text, since JSON has no other.

    Attributes:
        graph_dir: Folder with manifest.json and the training graphs of the version that is trained.
        coordinator_key_pem: Ed25519 public key that signs train orders.
        superlink: HOST:PORT of the proxy, or of the SuperLink itself.
        cert_path: The device's certificate, which the proxy is shown, and `key_path` its key; None to show none.
        definition: `FILE.py:NAME` of the model's definition, for the Opacus engine; None if the owner gave none.
        samples_path: The device's private samples.
        samples_key: What they are sealed with, 64 hex digits; in no message and no repr.
        training_dir: Where ledger and stored updates live.
        epsilon_limit: The owner's largest total epsilon for this model, over all runs; > 0.
        total_epsilon_limit: The owner's largest total epsilon over all models; > 0.
        delta: The owner's delta, at which these totals are stated; (0, 1).
        noise_multiplier_limit: The owner's least noise multiplier; >= 0.
        trusts_coordinator: Whether the coordinator may see an update that has no noise yet.
        ledger_copy: What the coordinator says that this device has spent; None if it says nothing.
    """

    device_id: str
    fleet: str
    model: str
    run: str
    graph_dir: str
    coordinator_key_pem: str
    superlink: str
    ca_path: str
    node_key_path: str
    cert_path: str | None = None
    key_path: str | None = None
    definition: str | None = None
    samples_path: str
    samples_key: str = field(repr=False)
    training_dir: str
    poll_interval_s: float
    idle_timeout_s: float
    epsilon_limit: Decimal
    total_epsilon_limit: Decimal
    delta: Decimal
    noise_multiplier_limit: Decimal
    trusts_coordinator: bool = False
    ledger_copy: LedgerHead | None = None

    def __post_init__(self) -> None:
        check_name(self.device_id, "device id")
        check_name(self.fleet, "fleet")
        check_name(self.model, "model")
        check_name(self.run, "run")
        for name, limit in (("epsilon", self.epsilon_limit), ("total_epsilon", self.total_epsilon_limit)):
            if not (limit.is_finite() and limit > 0):
                raise ValueError(f"{name}_limit is {limit}, must be finite and > 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, must be in (0, 1)")
        if not (self.noise_multiplier_limit.is_finite() and self.noise_multiplier_limit >= 0):
            raise ValueError(f"noise_multiplier_limit is {self.noise_multiplier_limit}, must be finite and >= 0")
        if len(self.samples_key) != 64 or not set(self.samples_key) <= set("0123456789abcdef"):
            raise ValueError("samples_key must be 64 hex digits")
        if self.poll_interval_s <= 0 or self.idle_timeout_s <= 0:
            raise ValueError("poll_interval_s and idle_timeout_s must be > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEvent:
    """Something that happened in the training process; nothing here derives from samples.

    Attributes:
        event: joined: the SuperLink knows the node; trained: an update was made and charged; resent: a
            stored one left again; refused: a genuine order beyond a limit, or that failed; order_refused:
            an order that is not acted on; ended: the process ends.
        message: One line for a person.
        epsilon: Spent in total on this model, a decimal number.
        round: It is about; of "joined" the last that was charged in the run, 0 before the first.
        ledger: What the ledger comes to; of "trained", told before the update leaves, and of "joined",
            unless it was restored and the run has charged nothing since.
    """

    event: Literal["joined", "trained", "resent", "refused", "order_refused", "ended"]
    message: str
    round: int | None = None
    epsilon: str | None = None
    ledger: LedgerHead | None = None


def build_job(job: TrainingJob) -> bytes:
    """Return `job` as JSON."""
    return build_json(job)


def parse_job(data: bytes) -> TrainingJob:
    """Return the job in `data`; raises MalformedError."""
    return parse_json(data, TrainingJob)


def build_event(event: TrainingEvent) -> bytes:
    """Return `event` as one line of JSON, newline included."""
    return build_json(event) + b"\n"


def parse_event(line: bytes) -> TrainingEvent:
    """Return the event in one line; raises MalformedError."""
    return parse_json(line, TrainingEvent)
