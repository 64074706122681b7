"""When a device moves from one model version to the next.

Pure: receives events, returns actions; never touches disk, network or clock.

    IDLE -offered-> FETCHING -fetched-> STAGED -activated-> PROBATION
      ^                |                  |                    |
      `-----failed-----+------failed------+---healthy/failed---'

A version is known by the digest of its manifest. Only what failed its probation is rejected for ever:
what could not be fetched or staged may be offered again.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias


class Phase(StrEnum):
    """Where an update stands; the values are those of a status message."""

    IDLE = "idle"
    FETCHING = "fetching"
    STAGED = "staged"
    PROBATION = "probation"


class Action(StrEnum):
    """What the caller must do next."""

    NOTHING = "nothing"
    FETCH = "fetch"  # the target; whatever else was being fetched is given up
    ABANDON = "abandon"  # what is being fetched: nobody offers it any more
    DEFER = "defer"  # the offer waits until the update under way has ended
    ACTIVATE = "activate"  # write the target to the idle slot and arm its trial
    TRY = "try"
    COMMIT = "commit"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True, slots=True)
class Offered:
    """The fleet offers this device this version; None lets it stay with what it runs."""

    digest: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """Every file of the target is here and verified."""

    digest: str


@dataclass(frozen=True, slots=True)
class Activated:
    """The target is in the idle slot and its trial is on disk."""

    digest: str


@dataclass(frozen=True, slots=True)
class Healthy:
    """The target answers."""

    digest: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The step that was under way did not succeed."""

    digest: str


Event: TypeAlias = Offered | Fetched | Activated | Healthy | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateState:
    """Everything that decides.

    Attributes:
        active: Digest of the version that is served, if any.
        target: Digest of the version that is to replace it; None exactly when idle.
        rejected: Digests that failed their probation.
    """

    phase: Phase = Phase.IDLE
    active: str | None = None
    target: str | None = None
    rejected: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if (self.phase is Phase.IDLE) != (self.target is None):
            raise ValueError(f"phase {self.phase} with target {self.target}")


_PROGRESS: dict[tuple[Phase, type[Event]], tuple[Phase, Action]] = {
    (Phase.FETCHING, Fetched): (Phase.STAGED, Action.ACTIVATE),
    (Phase.FETCHING, Failed): (Phase.IDLE, Action.NOTHING),
    (Phase.STAGED, Activated): (Phase.PROBATION, Action.TRY),
    (Phase.STAGED, Failed): (Phase.IDLE, Action.NOTHING),
    (Phase.PROBATION, Healthy): (Phase.IDLE, Action.COMMIT),
    (Phase.PROBATION, Failed): (Phase.IDLE, Action.ROLL_BACK),
}


def advance(state: UpdateState, event: Event) -> tuple[UpdateState, Action]:
    """Return the state after `event` and what to do; an event that does not fit is late and changes nothing."""
    if isinstance(event, Offered):
        return _consider(state, event.digest)
    step = _PROGRESS.get((state.phase, type(event)))
    if step is None or event.digest != state.target:
        return state, Action.NOTHING
    phase, action = step
    if phase is not Phase.IDLE:
        return replace(state, phase=phase), action
    active = state.target if action is Action.COMMIT else state.active
    rejected = state.rejected | {event.digest} if action is Action.ROLL_BACK else state.rejected
    return UpdateState(active=active, rejected=rejected), action


def _consider(state: UpdateState, digest: str | None) -> tuple[UpdateState, Action]:
    if digest == state.target:  # QoS 1 may deliver an offer twice, and a daily one differs in its dates alone
        return state, Action.NOTHING
    if state.phase in (Phase.STAGED, Phase.PROBATION):
        return state, Action.NOTHING if digest is None else Action.DEFER
    if digest is None or digest == state.active or digest in state.rejected:
        idle = replace(state, phase=Phase.IDLE, target=None)
        return idle, Action.NOTHING if state.phase is Phase.IDLE else Action.ABANDON
    return replace(state, phase=Phase.FETCHING, target=digest), Action.FETCH
