"""Unsigned MQTT payloads between a device and the coordinator, one frozen dataclass each."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from models.contract.ledger import LedgerHead
from models.contract.wave import Traits

MESSAGE_MAX_BYTES = 16 * 1024
NUMBER_MAX = 2**31 - 1  # of versions and rounds


class EventKind(StrEnum):
    """What can happen on a device; states of the champion's updates are named as ThingsBoard's `fw_state`."""

    DOWNLOADING = "DOWNLOADING"
    DOWNLOADED = "DOWNLOADED"
    VERIFIED = "VERIFIED"
    UPDATING = "UPDATING"
    UPDATED = "UPDATED"
    FAILED = "FAILED"
    CHALLENGER_SET = "CHALLENGER_SET"
    CHALLENGER_REFUSED = "CHALLENGER_REFUSED"
    CHALLENGER_ENDED = "CHALLENGER_ENDED"
    TRAINING_STARTED = "TRAINING_STARTED"
    TRAINING_REFUSED = "TRAINING_REFUSED"
    TRAINING_ENDED = "TRAINING_ENDED"
    ORDER_REFUSED = "ORDER_REFUSED"
    PRIVACY_SPENT = "PRIVACY_SPENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Retained: the last known state of a device; its will is the same with `online` false.

    Attributes:
        sent_at: Unix time, s.
        agent: Version of the agent.
        model: What it serves, once it serves something.
        version: Active version.
        digest: Of the active version's manifest.
        slot: Where the active version lies.
        trains: Whether this device can join a run.
        challenger: Version that stands beside the active one, if any does.
        traits: What releases may ask of it; None from agents that do not say.
    """

    schema_version: Literal[1] = 1
    sent_at: float
    online: bool
    agent: str
    model: str
    version: int | None = None
    digest: str | None = None
    slot: Literal["a", "b"] | None = None
    update: Literal["idle", "fetching", "staged", "probation"] = "idle"
    trains: bool = False
    challenger: int | None = None
    traits: Traits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Periodic measurements of the device itself; nothing here derives from private samples.

    Attributes:
        id: Unique per device; a reader de-duplicates by it.
        sent_at: Unix time, s.
        latency_p50_ms: Of the model's answers since the last telemetry; None without requests.
        dropped: Telemetry and events that this device could not keep until they had arrived, in all.
    """

    schema_version: Literal[1] = 1
    id: str
    sent_at: float
    uptime_s: float
    rss_mb: float
    model: str
    version: int | None = None
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened once on a device.

    Attributes:
        id: Unique per device; the coordinator acknowledges it.
        message: One line for a person.
        version: The model version it is about.
        run: The run it is about.
        ledger: What training has cost the device up to `round` of `run`; the coordinator keeps a copy.
    """

    schema_version: Literal[1] = 1
    id: str
    sent_at: float
    kind: EventKind
    message: str
    model: str | None = None
    version: int | None = None
    run: str | None = None
    round: int | None = None
    ledger: LedgerHead | None = None

    def __post_init__(self) -> None:
        for name, number in (("version", self.version), ("round", self.round)):
            if number is not None and not 0 <= number <= NUMBER_MAX:
                raise ValueError(f"{name} is {number}, must be in 0..{NUMBER_MAX}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The coordinator has these events of a device on disk."""

    schema_version: Literal[1] = 1
    ids: tuple[str, ...]
