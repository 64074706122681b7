"""What an operator says of a rollout; names in camel case are those of AWS IoT Jobs, whose documents say the same."""

from dataclasses import dataclass, field
from decimal import Decimal

from models.contract.terms import ProbationRules
from models.contract.topics import check_name
from models.contract.wave import Requirements

FULL = Decimal(100)
DEVICES_MAX = 500  # listed ones: all of them stand in the offer that every device fetches
_RATE_MAX = 10**9  # a minute; more than there are devices


@dataclass(frozen=True, slots=True, kw_only=True)
class RateIncreaseCriteria:
    """The rate rises each time that so many more devices have succeeded."""

    numberOfSucceededThings: int  # noqa: N815

    def __post_init__(self) -> None:
        if self.numberOfSucceededThings < 1:
            raise ValueError(f"numberOfSucceededThings is {self.numberOfSucceededThings}, must be >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialRate:
    """Devices a minute: the base, multiplied by the factor at each increase."""

    baseRatePerMinute: int  # noqa: N815
    incrementFactor: Decimal  # noqa: N815
    rateIncreaseCriteria: RateIncreaseCriteria  # noqa: N815

    def __post_init__(self) -> None:
        if self.baseRatePerMinute < 1:
            raise ValueError(f"baseRatePerMinute is {self.baseRatePerMinute}, must be >= 1")
        if not self.incrementFactor.is_finite() or not 1 <= self.incrementFactor <= 5:
            raise ValueError(f"incrementFactor is {self.incrementFactor}, must be in 1..5")


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortCriterion:
    """Broken once so many devices have ended, and this share of them has failed."""

    thresholdPercentage: Decimal = Decimal(20)  # noqa: N815
    minNumberOfExecutedThings: int = 1  # noqa: N815

    def __post_init__(self) -> None:
        if not self.thresholdPercentage.is_finite() or not 0 < self.thresholdPercentage <= FULL:
            raise ValueError(f"thresholdPercentage is {self.thresholdPercentage}, must be above 0, at most 100")
        if self.minNumberOfExecutedThings < 1:
            raise ValueError(f"minNumberOfExecutedThings is {self.minNumberOfExecutedThings}, must be >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortConfig:
    """The fleet goes back as soon as one criterion is broken; without any, failures end nothing."""

    criteriaList: tuple[AbortCriterion, ...] = (AbortCriterion(),)  # noqa: N815


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRule:
    """The fleet goes back when devices on the new version take this much longer than those on the one before.

    Attributes:
        max_ratio: Most that one median of the devices' medians may be of the other.
        min_devices: That must have told a latency, on each side.
    """

    max_ratio: Decimal
    min_devices: int = 3

    def __post_init__(self) -> None:
        if not self.max_ratio.is_finite() or self.max_ratio < 1:
            raise ValueError(f"max_ratio is {self.max_ratio}, must be >= 1")
        if self.min_devices < 1:
            raise ValueError(f"min_devices is {self.min_devices}, must be >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """How a version comes to the fleet.

    Attributes:
        waves: Percentages of the fleet, rising; the first may be 0, for the listed devices alone.
        devices: Ids of those that are in every wave.
        requirements: What a device must be.
        probation: What the version must show on each device first.
        maximumPerMinute: Devices that a wave may grow by in a minute; None for all at once.
        exponentialRate: A rate that rises with success, up to maximumPerMinute.
        abortConfig: Which failures end it.
        latency: Which latency ends it; None for any.
        max_quality_drop: Most that the version may be worse than the champion on the server's held-out data, in units
            of the metric.
    """

    waves: tuple[Decimal, ...] = (FULL,)
    devices: tuple[str, ...] = ()
    requirements: Requirements = field(default_factory=Requirements)
    probation: ProbationRules = field(default_factory=ProbationRules)
    maximumPerMinute: int | None = None  # noqa: N815
    exponentialRate: ExponentialRate | None = None  # noqa: N815
    abortConfig: AbortConfig = field(default_factory=AbortConfig)  # noqa: N815
    latency: LatencyRule | None = None
    max_quality_drop: Decimal = Decimal("0.03")  # what packaging may cost, too

    def __post_init__(self) -> None:
        for percentage in self.waves:
            if not percentage.is_finite() or not 0 <= percentage <= FULL:
                raise ValueError(f"a wave is of {percentage} %, must be in 0..100")
        if list(self.waves) != sorted(set(self.waves)) or self.waves[-1:] != (FULL,):
            raise ValueError(f"waves are {', '.join(map(str, self.waves)) or 'none'}, must rise and end with 100")
        if len(self.devices) > DEVICES_MAX:
            raise ValueError(f"{len(self.devices)} devices are listed, at most {DEVICES_MAX}; use a percentage")
        for device in self.devices:
            check_name(device, "device")
        if self.maximumPerMinute is not None and self.maximumPerMinute < 1:
            raise ValueError(f"maximumPerMinute is {self.maximumPerMinute}, must be >= 1")
        if not self.max_quality_drop >= 0:
            raise ValueError(f"max_quality_drop is {self.max_quality_drop}, must be >= 0")

    def compute_rate(self, succeeded: int) -> int | None:
        """Return devices a minute once so many have succeeded; None without a limit."""
        if self.exponentialRate is None:
            return self.maximumPerMinute
        exponential = self.exponentialRate
        increases = succeeded // exponential.rateIncreaseCriteria.numberOfSucceededThings
        rate = exponential.baseRatePerMinute * exponential.incrementFactor**increases
        return int(min(rate, Decimal(self.maximumPerMinute or _RATE_MAX)))
