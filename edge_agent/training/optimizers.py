"""What a device makes of a noised sum of gradients: SGD with momentum, or Adam.

Post-processing, so privacy has no part in it, and float32 will do. State begins anew each round: it would else be one
more thing that a device keeps about its data.

Source:
    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1 (Adam).
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from models.contract.privacy import ADAM_DECAYS, TrainingPlan
from models.tensors.layout import Vector

# A noised sum, shape (n,), that is overwritten with what to subtract from the parameters.
Optimizer: TypeAlias = Callable[[Vector], None]

_ADAM_EPSILON = np.float32(1e-8)


def build_optimizer(training: TrainingPlan, size: int) -> Optimizer:
    """Return the optimiser of one round of `training` over `size` parameters."""
    learning_rate, batch = float(training.learning_rate), float(training.expected_batch)
    if training.optimizer == "adam":
        return _build_adam(learning_rate, batch, size)
    scale, momentum = np.float32(learning_rate / batch), np.float32(training.momentum)
    velocity = np.zeros(size if training.momentum else 0, np.float32)

    def descend(total: Vector) -> None:
        if momentum:
            np.multiply(velocity, momentum, out=velocity)
            np.add(velocity, total, out=velocity)
            np.multiply(velocity, scale, out=total)
        else:
            np.multiply(total, scale, out=total)

    return descend


def _build_adam(learning_rate: float, batch: float, size: int) -> Optimizer:
    mean, square = np.zeros(size, np.float32), np.zeros(size, np.float32)
    steps = 0

    def descend(total: Vector) -> None:
        nonlocal steps
        steps += 1
        np.multiply(total, np.float32(1 / batch), out=total)
        for moment, decay, value in zip((mean, square), ADAM_DECAYS, (total, total * total), strict=True):
            np.multiply(moment, np.float32(decay), out=moment)
            np.add(moment, np.float32(1 - decay) * value, out=moment)
        of_mean, of_square = (1 - decay**steps for decay in ADAM_DECAYS)
        scale = np.sqrt(square / np.float32(of_square)) + _ADAM_EPSILON
        np.divide(mean * np.float32(learning_rate / of_mean), scale, out=total)

    return descend
