"""Under which privacy a run trains, and what a release may say about it."""

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Literal, TypeAlias

Uplink: TypeAlias = Literal["float32", "int8"]
Participation: TypeAlias = Literal["hidden", "visible"]

ADAM_DECAYS = (0.9, 0.999)  # of the means of gradients and of their squares, as the paper has them


class Unit(StrEnum):
    """What a guarantee protects."""

    SAMPLE = "sample"  # one record; the device adds the noise
    DEVICE = "device"  # all that one device holds; the coordinator adds the noise


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """The differential privacy of one run.

    Attributes:
        unit: What is protected.
        clipping_norm: L2 bound C of one unit's contribution, a sample's gradient or a device's update; > 0.
        noise_multiplier: z; the noise on a sum has standard deviation z * C; >= 0.
        sampling_rate: q, with which each unit takes part, independently: a sample in a step, a device in a round; (0, 1].
        delta: Chance that the bound fails; (0, 1).
        epsilon: What the whole run may spend at most; > 0.
        participation: Whether anybody but the coordinator can see which devices a round of unit `device` has drawn:
            only a draw that is hidden makes the rounds cost less.
    """

    unit: Unit
    clipping_norm: Decimal
    noise_multiplier: Decimal
    sampling_rate: Decimal
    delta: Decimal
    epsilon: Decimal
    participation: Participation = "hidden"

    def __post_init__(self) -> None:
        _check_finite(self.clipping_norm, self.noise_multiplier, self.sampling_rate, self.delta, self.epsilon)
        if self.clipping_norm <= 0:
            raise ValueError(f"clipping_norm is {self.clipping_norm}, must be > 0")
        if self.noise_multiplier < 0:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}, must be >= 0")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}, must be in (0, 1]")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, must be in (0, 1)")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon is {self.epsilon}, must be > 0")
        if self.participation not in {"hidden", "visible"}:
            raise ValueError(f"participation is {self.participation!r}, must be hidden or visible")
        if self.participation == "visible" and self.unit is not Unit.DEVICE:
            raise ValueError("participation can be visible for unit device only: which samples a step drew never is")

    @property
    def claimed_rate(self) -> Decimal:
        """The q that may be claimed: 1 for draws that others see."""
        return Decimal(1) if self.participation == "visible" else self.sampling_rate

    def count_charged_steps(self, training: "TrainingPlan") -> int:
        """Return the steps of `claimed_rate` that a device charges itself: those of a round, or of the whole run.

        Of unit `device` the guarantee is over all planned rounds, those included that did not draw it: a device pays
        for them once, when it first takes part.
        """
        return training.steps if self.unit is Unit.SAMPLE else training.rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """How a device trains in one round.

    Attributes:
        rounds: Rounds of the run; >= 1.
        steps: Steps a device makes in one round; >= 1.
        expected_batch: Of unit `sample` the fixed denominator of a step's sum, in samples, a constant of the plan and
            never the private number of samples; of unit `device` the samples that a step expects; > 0.
        learning_rate: Of the device's optimiser; > 0.
        momentum: Of the device's SGD, begun anew each round; [0, 1); 0 for Adam.
        optimizer: Of the device; its state begins anew each round.
        proximal_mu: Weight of FedProx's pull towards the round's start, mu / 2 times the squared distance; at least
            0, and at most 1 / learning_rate, where one step would lead all the way back.
        uplink: How an update travels to the coordinator.
    """

    rounds: int
    steps: int
    expected_batch: Decimal
    learning_rate: Decimal
    momentum: Decimal = Decimal(0)
    optimizer: Literal["sgd", "adam"] = "sgd"
    proximal_mu: Decimal = Decimal(0)
    uplink: Uplink = "float32"

    def __post_init__(self) -> None:
        _check_finite(self.expected_batch, self.learning_rate, self.momentum, self.proximal_mu)
        if not (1 <= self.rounds <= 100_000 and 1 <= self.steps <= 100_000):
            raise ValueError(f"rounds {self.rounds} and steps {self.steps} must be in 1..100000")
        if self.expected_batch <= 0 or self.learning_rate <= 0:
            raise ValueError("expected_batch and learning_rate must be > 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, must be in [0, 1)")
        if self.optimizer not in {"sgd", "adam"}:
            raise ValueError(f"optimizer is {self.optimizer!r}, must be sgd or adam")
        if self.uplink not in {"float32", "int8"}:
            raise ValueError(f"uplink is {self.uplink!r}, must be float32 or int8")
        if self.optimizer == "adam" and self.momentum:
            raise ValueError(f"momentum is {self.momentum}, must be 0 for adam, which has its own")
        if self.proximal_mu < 0 or self.proximal_mu * self.learning_rate > 1:
            raise ValueError(
                f"proximal_mu is {self.proximal_mu}, must be in [0, 1 / learning_rate] with learning_rate "
                f"{self.learning_rate}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyStatement:
    """What a version says of its own privacy; signed with it.

    Attributes:
        epsilon: Spent by every unit, at most, for this version; >= 0.
        mechanism: For example "DP-SGD, Poisson sampling, Gaussian noise".
        accountant: What computed epsilon, for example "RDP".
        expected_cohort: Devices a round expects; 0 for a version that saw no private data.
        trust_model: The sentence that is said to users.
    """

    unit: Unit
    epsilon: Decimal
    delta: Decimal
    mechanism: str
    accountant: str
    expected_cohort: int
    trust_model: str

    def __post_init__(self) -> None:
        _check_finite(self.epsilon, self.delta)
        if self.epsilon < 0 or not 0 <= self.delta < 1:
            raise ValueError(f"epsilon {self.epsilon} must be >= 0 and delta {self.delta} in [0, 1)")


def _check_finite(*values: Decimal) -> None:
    for value in values:
        if not value.is_finite():
            raise ValueError(f"{value} is not finite")
