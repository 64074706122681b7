"""Which rule makes one step of a round's updates, and with what it cannot be combined. Pure; the command line reads it.

| rule | the step is | withstands f hostile devices of n |
| --- | --- | --- |
| mean | the mean of all updates | none |
| median | the median of each coordinate | 2 f < n |
| trimmed-mean | the mean of each coordinate without its f largest and f smallest values | 2 f < n |
| multi-krum | the mean of the n - f - 2 updates that are nearest to their n - f - 2 neighbours | 2 f + 2 < n |
| norm-filter | the mean without the f longest updates: against scaled ones only, not against flipped ones | 2 f < n |

Source:
    Yin et al. 2018, arXiv:1803.01498 (median, trimmed mean); Blanchard et al. 2017, "Machine Learning with
    Adversaries", and Damaskinos et al. 2019, "AggregaThor" (multi-Krum with n - f - 2).
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from models.contract.privacy import Unit

RuleName: TypeAlias = Literal["mean", "median", "trimmed-mean", "multi-krum", "norm-filter"]
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """How a round's updates become one step.

    Attributes:
        rule: As the table above has it.
        byzantine: f, how many devices may send anything they like; 0 for the mean, at least 1 for any other.
    """

    rule: RuleName = "mean"
    byzantine: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULE_NAMES:
            raise ValueError(f"aggregation is {self.rule!r}, must be one of {', '.join(RULE_NAMES)}")
        if self.rule == "mean" and self.byzantine != 0:
            raise ValueError(
                f"the mean withstands no hostile device, and byzantine is {self.byzantine}: use another rule"
            )
        if self.rule != "mean" and self.byzantine < 1:
            raise ValueError(f"{self.rule} needs byzantine, the number of devices to withstand, at least 1")

    @property
    def least_updates(self) -> int:
        """Below so many updates the rule withstands nothing, and there is no round."""
        return 2 * self.byzantine + (3 if self.rule == "multi-krum" else 1)

    def check_fits(self, unit: Unit, *, devices: int) -> None:
        """Raise ValueError, in one sentence, unless the rule can serve a run of so many `devices` at `unit`."""
        if self.rule == "mean":
            return
        if unit is Unit.DEVICE:
            raise ValueError(
                f"{self.rule} cannot be combined with the device unit: its noise bounds what one device adds to a sum, "
                "and says nothing of any other rule; use mean"
            )
        if devices < self.least_updates:
            raise ValueError(
                f"{self.rule} withstands {self.byzantine} hostile devices of {self.least_updates} or more, "
                f"and there are {devices}"
            )


MEAN = Aggregation()
