"""Training on one device for the privacy unit `device`: plain SGD or Adam, and one clip over the whole update.

What stays on the device is bounded by itself: the guarantee is over what leaves, and the coordinator, whose clipping
norm may follow how long updates are, sees these alone.

There is no noise in it: the coordinator adds it to the sum of a cohort. Nothing here protects anybody from the
coordinator, so the owner has to have said that it is trusted.

Source:
    McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", arXiv:1710.06963, Algorithm 1.
"""

from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.training.dp_sgd import Sampler
from edge_agent.training.optimizers import Descent
from edge_agent.training.step import Step
from models.contract.privacy import PrivacyPlan, TrainingPlan
from models.tensors.layout import Vector
from models.tensors.norms import clip_norm

_UNBOUNDED = 1e6  # of one sample's gradient: the step clips, and nothing that trains well is so long


def bounded_training(
    step: Step,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    parameters: Vector,
    privacy: PrivacyPlan,
    training: TrainingPlan,
    sampler: Sampler,
) -> Vector:
    """Return the update of one round, shape (n,), float32.

    Its L2 norm is at most `clipping_norm`, over the parameters that are shared and over those that are local.

    Args:
        step: Of the version that is trained.
        x: All samples, first axis the sample; may be empty.
        y: Their targets.
        parameters: Where to start, shape (n,). Not modified.
        privacy: Of unit device.
        training: Steps, expected batch, optimiser.
        sampler: Draws who takes part in a step.

    Raises:
        StalledError: The step fails.
    """
    rate = min(training.expected_batch / max(len(x), 1), Decimal(1))
    descent = Descent(training, parameters)
    with np.errstate(over="ignore", invalid="ignore"):  # a warning would tell of the samples, too
        for _ in range(training.steps):
            drawn = np.flatnonzero(sampler(len(x), rate))
            total = step.clipped_sum(x[drawn], y[drawn], _UNBOUNDED, descent.current)
            if len(x) < training.expected_batch:
                total *= float(training.expected_batch) / max(len(x), 1)  # all samples are a batch of their own size
            descent.step(total)
    if not np.isfinite(descent.moved).all():
        return np.zeros_like(
            parameters
        )  # training diverged; to say so would tell of the samples, and nobody noises a word
    moved, limit = descent.moved, float(privacy.clipping_norm)
    for part in (~step.is_local, step.is_local):
        moved[part] = clip_norm(moved[part], limit)
    return moved
