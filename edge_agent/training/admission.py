"""Whether this machine may train now: what was measured against what its owner allows.

Pure. Reasons leave the device, so that they name the owner's key and no measurement. Load, the pause after an end and
new samples, which tell what the owner does, share one text. It still says that one of them refused, and an owner who
bounds samples alone has told which.
"""

from dataclasses import dataclass

from edge_agent.config import TrainingSettings

NOT_NOW = "not admitted here now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What was measured; None for what this machine cannot tell, which then refuses nothing.

    Attributes:
        on_mains: Also of a machine without a battery.
        battery: Share of its charge, 0 to 1.
        temperature_c: Of the hottest sensor.
        load: Share of all processor time that everything but training takes, 0 to 1.
        metered: Whether bytes cost the owner money.
        minute: Of the day, local time, 0 to 1439.
        new_samples: Since the last run that this device trained in.
    """

    on_mains: bool
    battery: float | None
    temperature_c: float | None
    load: float | None
    metered: bool
    minute: int
    new_samples: int | None = None


def find_refusal(allowed: TrainingSettings, now: Conditions) -> str | None:
    """Return why this machine may not train now; None if it may."""
    reasons = (
        (allowed.needs_mains and not now.on_mains, "it runs on battery (training.needs_mains)"),
        (
            not now.on_mains and now.battery is not None and now.battery < allowed.min_battery,
            "its battery is too low (training.min_battery)",
        ),
        (_exceeds(now.temperature_c, allowed.max_temperature_c), "it is too hot (training.max_temperature_c)"),
        (_exceeds(now.load, allowed.max_load), NOT_NOW),
        (now.metered and not allowed.allow_metered, "its network is metered (training.allow_metered)"),
        (not is_within(allowed.minutes, now.minute), "it trains at other hours (training.hours)"),
        (now.new_samples is not None and now.new_samples < allowed.min_new_samples, NOT_NOW),
    )
    return next((reason for is_refused, reason in reasons if is_refused), None)


def is_within(minutes: tuple[int, int] | None, minute: int) -> bool:
    """Return whether `minute` of the day lies in [first, end) of `minutes`, across midnight if end <= first."""
    if minutes is None:
        return True
    first, end = minutes
    return first <= minute < end if first < end else minute >= first or minute < end


def _exceeds(measured: float | None, most: float) -> bool:
    return measured is not None and measured > most
