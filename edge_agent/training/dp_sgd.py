"""Private training on one device: DP-SGD around the step of one version.

The step clips each sample's gradient and sums; what is here draws the batch, adds the noise, and steps.
Local parameters are clipped and noised with all others: without it one sample would move the gradients of all others
through them, round after round. Nothing that depends on a sample is counted or divided by before the noise is on it.

The noise stands for a little more than the clipping norm: for what a sample may exceed it by through float32 rounding
in the step's norms and sums, which the check on load allows as well, and through rounding to the noise's grid.

Source:
    Abadi et al. 2016, "Deep Learning with Differential Privacy", arXiv:1607.00133, Algorithm 1, with
    Poisson sampling and the plan's expected batch as the denominator.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_agent.training.optimizers import Descent
from edge_agent.training.sensitivity import TOLERANCE
from edge_agent.training.step import Step
from models.contract.privacy import PrivacyPlan, TrainingPlan
from models.tensors.layout import Vector
from models.tensors.noise import GRID_SLACK, add_on_grid, build_grid

_Floats: TypeAlias = npt.NDArray[np.float64]
_Array: TypeAlias = npt.NDArray[Any]

Noise: TypeAlias = Callable[[int, float], _Floats]  # count, standard deviation -> shape (count,)
Sampler: TypeAlias = Callable[[int, Decimal], npt.NDArray[np.bool_]]  # count, rate -> shape (count,)

_SENSITIVITY = 1 + TOLERANCE + GRID_SLACK  # of a step's sum to one sample at most, in clipping norms


def local_training(
    step: Step,
    x: _Array,
    y: _Array,
    parameters: Vector,
    privacy: PrivacyPlan,
    training: TrainingPlan,
    noise: Noise,
    sampler: Sampler,
) -> Vector:
    """Return the update of one round of DP-SGD, shape (n,), float32.

    Args:
        step: Of the version that is trained.
        x: All samples, first axis the sample; may be empty.
        y: Their targets.
        parameters: Where to start, shape (n,). Not modified.
        privacy: Of unit sample.
        training: Steps, expected batch, optimiser.
        noise: Draws the noise, into an array of its own.
        sampler: Draws who takes part in a step.

    Raises:
        StalledError: The step fails.
    """
    clipping_norm = float(privacy.clipping_norm)
    standard_deviation = float(privacy.noise_multiplier) * clipping_norm * _SENSITIVITY
    grid = build_grid(step.size, clipping_norm)
    descent = Descent(training, parameters)
    for _ in range(training.steps):
        drawn = np.flatnonzero(sampler(len(x), privacy.sampling_rate))
        total = step.clipped_sum(x[drawn], y[drawn], clipping_norm, descent.current)
        add_on_grid(total, noise(step.size, standard_deviation), grid)
        descent.step(total)
    return descent.moved
