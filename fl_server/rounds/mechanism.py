"""The Gaussian mechanism of the privacy unit `device`, and its clipping norm that follows a quantile. Pure.

    cohort     each enrolled device with probability q, drawn anew every round
    step       (sum of clipped updates + N(0, (z C)^2)) / (q times the enrolled), however many replied
    C          times exp(-0.2 (b - target)), b the noised share of updates that C did not cut

Source:
    McMahan et al. 2018, arXiv:1710.06963, with its fixed denominator.
    Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", arXiv:1905.03871, Theorem 1.
"""

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.contract.privacy import PrivacyPlan, Uplink
from models.tensors.noise import GRID_SLACK, Entropy, add_on_grid, build_grid, draw_gaussian, draw_poisson

_Floats: TypeAlias = npt.NDArray[np.float64]

_CUT: dict[Uplink, float] = {
    "float32": 1 - 1e-4,
    "int8": 0.98,
}  # of C: an update so long was cut by it, as the uplink's rounding leaves it
_RATE = 0.2
_COUNT_NOISE_SHARE = 1 / 20  # of the expected cohort: the deviation of the noise on the count, as the paper has it
_SENSITIVITY = 1 + GRID_SLACK


def draw_cohort(enrolled: Iterable[str], sampling_rate: Decimal, entropy: Entropy) -> tuple[str, ...]:
    """Return who takes part in a round, each of `enrolled` independently with `sampling_rate`."""
    names = sorted(enrolled)
    drawn = draw_poisson(len(names), sampling_rate, entropy)
    return tuple(name for name, takes_part in zip(names, drawn, strict=True) if takes_part)


def compute_expected_cohort(plan: PrivacyPlan, enrolled: int) -> float:
    """Return how many devices a round expects: a constant of the run."""
    return float(plan.sampling_rate) * enrolled


def compute_sum_noise(plan: PrivacyPlan, expected_cohort: float, *, is_adaptive: bool) -> float:
    """Return the noise multiplier of the sum; where the count of cut updates is released too, both together cost z.

    Raises:
        ValueError: The cohort is too small for its count to be told at this noise.
    """
    noise_multiplier = float(plan.noise_multiplier)
    if not is_adaptive or not noise_multiplier:
        return noise_multiplier
    of_count = 2 * _COUNT_NOISE_SHARE * expected_cohort  # a device moves the centred count by 1/2
    if of_count <= noise_multiplier:
        raise ValueError(
            f"adaptive clipping needs an expected cohort above {10 * noise_multiplier:.1f} devices at a noise multiplier "
            f"of {noise_multiplier:g}, this one is {expected_cohort:g}: fix the clipping norm"
        )
    return 1 / math.sqrt(noise_multiplier**-2 - of_count**-2)


def noise_sum(total: _Floats, *, clipping_norm: float, noise_multiplier: float, entropy: Entropy) -> None:
    """Noise `total`, a sum of updates of L2 norm `clipping_norm` at most; shape (n,), overwritten."""
    noise = draw_gaussian(total.size, noise_multiplier * clipping_norm * _SENSITIVITY, entropy)
    add_on_grid(total, noise, build_grid(total.size, clipping_norm))


def is_uncut(norm: float, clipping_norm: float, uplink: Uplink = "float32") -> bool:
    """Return whether an update that arrived with L2 norm `norm` is one that `clipping_norm` did not cut."""
    return norm < _CUT[uplink] * clipping_norm


def adapt_clipping_norm(
    clipping_norm: float, uncut: int, replies: int, *, target: float, expected_cohort: float, entropy: Entropy
) -> float:
    """Return the clipping norm of the next round.

    Args:
        clipping_norm: Of this round.
        uncut: Updates that it did not cut.
        replies: Updates that count.
        target: The share that it should not cut.
        expected_cohort: As in every round of the run.
        entropy: Of the noise on the count.
    """
    centred = np.array([uncut - replies / 2])
    deviation = _COUNT_NOISE_SHARE * expected_cohort * _SENSITIVITY
    add_on_grid(centred, draw_gaussian(1, deviation, entropy), build_grid(1, 0.5))
    share = centred[0] / expected_cohort + 0.5
    return clipping_norm * math.exp(-_RATE * (min(max(share, 0.0), 1.0) - target))
