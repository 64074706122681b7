"""How a version reaches a fleet in waves, and when that ends by itself.

Pure: receives what an operator says, what devices report and what time it is; never touches disk, network or clock.

    ROLLING -approve-> ROLLING (next wave) ... -> DONE: the last wave has its full percentage
      |  ^                                          |  (reports still count)
    halt  resume                                  halt
      v  |                                          v
    HALTED: nobody begins any more; who has the version keeps it
      |
      `--> ROLLED_BACK, from everywhere: an operator's word, or a rule that is broken

A wave grows at most as fast as its rate allows, once a minute; time in which the coordinator is down does not count.
"""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction

from fl_server.errors import ServerError
from fl_server.rollout.plan import LatencyRule, RolloutPlan
from models.contract.manifest import Runtime
from models.contract.wave import Wave, compute_place

TICK_S = 60.0  # each step is an offer to the whole fleet
_DIGITS = 20  # places are multiples of 100 / 2**64 %, so that two never become the same


class RolloutError(ServerError):
    """The rollout is not where this can be said."""


class Phase(StrEnum):
    """Where a rollout is."""

    ROLLING = "rolling"
    HALTED = "halted"
    DONE = "done"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many devices' last word on the version is that it serves, and how many's that it failed."""

    updated: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Everything that decides.

    Attributes:
        version: What is rolled out.
        before: The champion that it takes the place of.
        previous: What was "previous" then, if anything was.
        key: Of the hash by which devices come into a wave.
        wave: Which of the plan's waves is being reached, from 0.
        percentage: What has been granted of it.
        grown_at: When that was last, Unix time, s.
        since: Number of the event after which reports count.
        reason: Why it was halted or rolled back.
        runtime: What the version needs on a device; None if it was begun before that was kept.
    """

    model: str
    version: int
    before: int
    previous: int | None
    key: str
    plan: RolloutPlan
    phase: Phase = Phase.ROLLING
    wave: int = 0
    percentage: Decimal = Decimal(0)
    grown_at: float = 0.0
    since: int = 0
    reason: str = ""
    runtime: Runtime | None = None

    def __str__(self) -> str:
        return f"the rollout of {self.model} version {self.version}"

    @property
    def goal(self) -> Decimal:
        """The percentage of the wave that is being reached."""
        return self.plan.waves[self.wave]

    @property
    def is_under_way(self) -> bool:
        """Whether it has not come to its end."""
        return self.phase in (Phase.ROLLING, Phase.HALTED)

    @property
    def obstacle(self) -> str | None:
        """Why nothing else can be released, in one line; None if it can."""
        if not self.is_under_way:
            return None
        return (
            f"{self} is {self.phase} at {self.percentage:.4g} %: let it come to its end (fl-server rollout status "
            f"{self.model}), or end it with fl-server rollback {self.model}"
        )

    @property
    def may_be_approved(self) -> bool:
        """Whether it waits for an operator to let the next wave begin."""
        return self.phase is Phase.ROLLING and self.percentage == self.goal

    @property
    def signed_wave(self) -> Wave | None:
        """What the release says while the version is champion; None is for everybody."""
        if self.phase is Phase.DONE:
            return None
        if self.phase is not Phase.ROLLING:
            return Wave(key=self.key, percentage=Decimal(0))
        return Wave(key=self.key, percentage=self.percentage, devices=self.plan.devices)


def grow(rollout: Rollout, *, devices: Collection[str], succeeded: int, now_s: float) -> Rollout:
    """Return the rollout with its wave as large as it may be now.

    Args:
        rollout: As it is.
        devices: Ids of all that are enrolled.
        succeeded: How many run the version.
        now_s: Unix time, s.
    """
    if rollout.phase is not Phase.ROLLING:
        return rollout
    rate = rollout.plan.compute_rate(succeeded)
    percentage = rollout.percentage
    if rate is None:
        percentage = rollout.goal
    elif percentage < rollout.goal and not 0 <= now_s - rollout.grown_at < TICK_S:
        percentage = _stretch(rollout, devices, rate)
    if percentage != rollout.percentage:
        rollout = replace(rollout, percentage=percentage, grown_at=now_s)
    is_last = rollout.wave == len(rollout.plan.waves) - 1
    return replace(rollout, phase=Phase.DONE) if is_last and percentage == rollout.goal else rollout


def _stretch(rollout: Rollout, devices: Collection[str], rate: int) -> Decimal:
    """Return the percentage below which `rate` devices come in that were not in before, at most the goal."""
    places = sorted(100 * compute_place(device, rollout.key) for device in set(devices) - set(rollout.plan.devices))
    waiting = [place for place in places if place >= Fraction(rollout.percentage)]
    if len(waiting) <= rate:
        return rollout.goal
    return min(rollout.goal, Decimal(int(waiting[rate] * 10**_DIGITS)).scaleb(-_DIGITS).normalize())


def approve(rollout: Rollout, wave: int) -> Rollout:
    """Return the rollout on its way to `wave`, the next one; once more does nothing."""
    if rollout.wave >= wave:
        return rollout
    if rollout.phase is not Phase.ROLLING:
        raise RolloutError(f"{rollout} is {rollout.phase}: there is no wave to approve")
    if not rollout.may_be_approved:
        raise RolloutError(
            f"{rollout} has reached {rollout.percentage:.4g} of {rollout.goal} %: a wave is approved once the one "
            "before is complete"
        )
    if wave >= len(rollout.plan.waves):
        raise RolloutError(f"{rollout} has reached its last wave, {rollout.goal} %")
    return replace(rollout, wave=wave)


def halt(rollout: Rollout, reason: str) -> Rollout:
    """Return the rollout with nobody beginning any more; once more does nothing."""
    if rollout.phase is Phase.HALTED:
        return rollout
    if rollout.phase is Phase.ROLLED_BACK:
        raise RolloutError(f"{rollout} was rolled back: {rollout.reason}")
    return replace(rollout, phase=Phase.HALTED, reason=reason)


def resume(rollout: Rollout, *, since: int) -> Rollout:
    """Return the rollout going on where it was halted; what devices reported up to event `since` counts no more."""
    if rollout.phase is Phase.ROLLING:
        return rollout
    if rollout.phase is not Phase.HALTED:
        raise RolloutError(f"{rollout} is {rollout.phase}, not halted")
    return replace(rollout, phase=Phase.ROLLING, reason="", since=since)


def roll_back(rollout: Rollout, reason: str) -> Rollout:
    """Return the rollout at its end: the version before serves again, everywhere."""
    return replace(rollout, phase=Phase.ROLLED_BACK, reason=reason)


def judge_failures(plan: RolloutPlan, tally: Tally) -> str | None:
    """Return how the plan's abort rule is broken, None if it is not."""
    executed = tally.updated + tally.failed
    for rule in plan.abortConfig.criteriaList:
        is_enough = tally.failed and executed >= rule.minNumberOfExecutedThings
        if is_enough and 100 * tally.failed >= rule.thresholdPercentage * executed:
            return (
                f"{tally.failed} of {executed} devices failed, {rule.thresholdPercentage} % of at least "
                f"{rule.minNumberOfExecutedThings} end it"
            )
    return None


def judge_latency(rule: LatencyRule, after: Sequence[float], before: Sequence[float]) -> str | None:
    """Return how the rule is broken by devices' median latencies, ms, on the version and on the one before."""
    if min(len(after), len(before)) < rule.min_devices:
        return None
    new, old = statistics.median(after), statistics.median(before)
    if Decimal(new) <= rule.max_ratio * Decimal(old):
        return None
    return f"devices on it take {new:.3g} ms, those on the version before {old:.3g} ms; {rule.max_ratio} times as much ends it"
