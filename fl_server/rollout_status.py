"""What devices say of a rollout, and where it stands: for its rules, for commands and for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from fl_server.fleet.roster import LastWord, Roster
from fl_server.rollout.waves import Phase, Rollout, Tally
from models.contract.wave import Traits, find_unmet


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a device does not run the version."""

    device: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStatus:
    """Where a rollout stands; the result of its jobs.

    Attributes:
        before: The champion before it.
        wave: Which of `waves` is being reached, from 1.
        percentage: What has been granted of it.
        awaits_approval: Whether that is all of it, and another one comes.
        updated: How many devices run the version.
        failures: Of those whose last word is that it failed.
        reason: Why it was halted or rolled back.
    """

    model: str
    version: int
    before: int
    phase: Phase
    wave: int
    waves: tuple[Decimal, ...]
    devices: tuple[str, ...]
    percentage: Decimal
    awaits_approval: bool
    updated: int
    failures: tuple[Failure, ...]
    reason: str

    def __str__(self) -> str:
        where = f"wave {self.wave} of {len(self.waves)}, {self.percentage:.4g} of {self.waves[self.wave - 1]} %"
        said = f"{self.updated} devices run it, on {len(self.failures)} it failed"
        lines = [f"{self.model} version {self.version}, after {self.before}: {self.phase}, {where}; {said}"]
        if self.reason:
            lines.append(f"  {self.phase}: {self.reason}")
        if self.awaits_approval:
            lines.append(f"  the next wave, {self.waves[self.wave]} %: fl-server rollout approve {self.model}")
        return "\n".join([*lines, *(f"  {failure.device}: {failure.message}" for failure in self.failures)])


def build_status(rollout: Rollout, words: Sequence[LastWord]) -> RolloutStatus:
    """Return where `rollout` stands, of which devices say `words`."""
    return RolloutStatus(
        model=rollout.model,
        version=rollout.version,
        before=rollout.before,
        phase=rollout.phase,
        wave=rollout.wave + 1,
        waves=rollout.plan.waves,
        devices=rollout.plan.devices,
        percentage=rollout.percentage,
        awaits_approval=rollout.may_be_approved,
        updated=count(words).updated,
        failures=tuple(Failure(device=word.device_id, message=word.message) for word in words if word.has_failed),
        reason=rollout.reason,
    )


def count(words: Sequence[LastWord]) -> Tally:
    """Return how many say that the version serves, and how many that it failed."""
    failed = sum(word.has_failed for word in words)
    return Tally(updated=len(words) - failed, failed=failed)


def list_words(roster: Roster, rollout: Rollout) -> list[LastWord]:
    """Return what devices say of `rollout` that it is for: others refuse the version, and must not end it."""
    words = roster.list_last_words(rollout.model, rollout.version, since=rollout.since)
    if not any(word.has_failed for word in words):
        return words
    known = {device.device_id: device.status.traits for device in roster.list_devices() if device.status}
    unfit = {device for device, traits in known.items() if traits is not None and _is_unfit(traits, rollout)}
    return [word for word in words if word.device_id not in unfit]


def _is_unfit(traits: Traits, rollout: Rollout) -> bool:
    lacks_runtime = rollout.runtime is not None and rollout.runtime not in traits.runtimes
    return lacks_runtime or find_unmet(traits, rollout.plan.requirements) is not None
