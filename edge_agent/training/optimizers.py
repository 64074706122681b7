"""What a device makes of sums of gradients: SGD with momentum, or Adam, with FedProx's pull to where a round began.

Noise, where a device adds any, is on the sums already: privacy has no part in this, and float32 will do. State begins anew each round: it would else be one
more thing that a device keeps about its data.

Source:
    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1 (Adam).
    Li et al. 2020, arXiv:1812.06127 (FedProx).
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.contract.privacy import ADAM_DECAYS, TrainingPlan
from models.tensors.layout import Vector

# A sum, shape (n,), that is overwritten with what to subtract from the parameters.
Optimizer: TypeAlias = Callable[[Vector], None]

_ADAM_EPSILON = np.float32(1e-8)


class Descent:
    """One round's way from where it began.

    Attributes:
        current: Where it is, shape (n,).
        moved: How far that is from where it began, shape (n,).
    """

    def __init__(self, training: TrainingPlan, parameters: Vector) -> None:
        """Begin at `parameters`, shape (n,), which are not modified."""
        self.current, self.moved = parameters.copy(), np.zeros_like(parameters)
        self._start, self._gradient = parameters, np.empty_like(parameters)
        self._optimizer = build_optimizer(training, len(parameters))
        self._pull = np.float32(training.proximal_mu * training.expected_batch)

    def step(self, total: npt.NDArray[np.float64]) -> None:
        """Go one step along `total`, a sum of gradients over a batch, shape (n,)."""
        np.copyto(self._gradient, total, casting="same_kind")
        if self._pull:
            np.add(self._gradient, self._pull * self.moved, out=self._gradient)
        self._optimizer(self._gradient)
        np.subtract(self.moved, self._gradient, out=self.moved)
        np.add(self._start, self.moved, out=self.current)


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
