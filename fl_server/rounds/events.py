"""What a driver tells the coordinator, one JSON object a line."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from models.contract.encoding import build_json
from models.contract.errors import MalformedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The run begins, or goes on, with these devices online."""

    event: Literal["joined"] = "joined"
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRefused:
    """One device's update does not count; the round goes on."""

    event: Literal["update_refused"] = "update_refused"
    round: int
    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCompleted:
    """The round's parameters are on disk; told again after a restart."""

    event: Literal["round"] = "round"
    round: int
    accepted: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """The round did not reach its quorum; the parameters are what they were before it."""

    event: Literal["abandoned"] = "abandoned"
    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """All rounds are complete."""

    event: Literal["done"] = "done"


Event: TypeAlias = Joined | UpdateRefused | RoundCompleted | Abandoned | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    event: str


_KINDS: dict[str, type[Event]] = {
    "joined": Joined,
    "update_refused": UpdateRefused,
    "round": RoundCompleted,
    "abandoned": Abandoned,
    "done": Done,
}


def build_event(event: Event) -> bytes:
    """Return `event` as one line of JSON, newline included."""
    return build_json(event) + b"\n"


def parse_event(line: bytes) -> Event:
    """Return the event in one line; raises MalformedError."""
    try:
        return msgspec.json.decode(line, type=_KINDS[msgspec.json.decode(line, type=_Head).event])
    except (msgspec.MsgspecError, KeyError) as error:
        raise MalformedError(f"event of a driver: {error}") from error
