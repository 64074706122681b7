"""How the coordinator moves the parameters by a round's step: post-processing, which costs no privacy. Pure.

| name | moment m | moment v | the parameters move by |
| --- | --- | --- | --- |
| fedavg | | | rate * step |
| fedavgm | b1 m + step | | rate * m |
| fedadagrad | b1 m + (1 - b1) step | v + step^2 | rate * m / (sqrt v + tau) |
| fedadam | b1 m + (1 - b1) step | b2 v + (1 - b2) step^2 | rate * m / (sqrt v + tau) |
| fedyogi | b1 m + (1 - b1) step | v - (1 - b2) step^2 sign(v - step^2) | rate * m / (sqrt v + tau) |

Source:
    Reddi et al. 2021, "Adaptive Federated Optimization", arXiv:2003.00295, Algorithm 2, with v = tau^2 at the start.
    Hsu et al. 2019, arXiv:1909.06335 (FedAvgM).
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

OptimizerName: TypeAlias = Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
OPTIMIZER_NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)
_Floats: TypeAlias = npt.NDArray[np.float64]

_SECOND_DECAY, _TAU = 0.99, 1e-3  # b2 and tau, as the paper found to serve everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizer:
    """Which rule, and its constants.

    Attributes:
        learning_rate: rate; > 0.
        momentum: b1; [0, 1), and 0 for fedavg.
    """

    name: OptimizerName = "fedavg"
    learning_rate: Decimal = Decimal(1)
    momentum: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZER_NAMES:
            raise ValueError(f"server optimizer is {self.name!r}, must be one of {', '.join(OPTIMIZER_NAMES)}")
        if not (self.learning_rate.is_finite() and self.learning_rate > 0):
            raise ValueError(f"server learning rate is {self.learning_rate}, must be > 0")
        if not (self.momentum.is_finite() and 0 <= self.momentum < 1):
            raise ValueError(f"server momentum is {self.momentum}, must be in [0, 1)")
        if self.name == "fedavg" and self.momentum:
            raise ValueError(f"server momentum is {self.momentum}, must be 0 for fedavg: use fedavgm")


FEDAVG = ServerOptimizer()


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What an optimiser remembers between rounds: m and v, each shape (n,), or (0,) where the rule has none."""

    first: _Floats
    second: _Floats


def begin_moments(optimizer: ServerOptimizer, size: int) -> Moments:
    """Return the moments before the first round."""
    first = np.zeros(0 if optimizer.name == "fedavg" else size)
    second = np.full(0 if optimizer.name in {"fedavg", "fedavgm"} else size, _TAU**2)
    return Moments(first, second)


def take_step(optimizer: ServerOptimizer, moments: Moments, step: _Floats) -> tuple[_Floats, Moments]:
    """Return by what the parameters move for a round's `step`, shape (n,), overwritten, and the moments after it."""
    rate, decay = float(optimizer.learning_rate), float(optimizer.momentum)
    if optimizer.name == "fedavg":
        return np.multiply(step, rate, out=step), moments
    if optimizer.name == "fedavgm":
        first = decay * moments.first + step
        return rate * first, Moments(first, moments.second)
    first, square = decay * moments.first + (1 - decay) * step, step * step
    if optimizer.name == "fedadagrad":
        second = moments.second + square
    elif optimizer.name == "fedadam":
        second = _SECOND_DECAY * moments.second + (1 - _SECOND_DECAY) * square
    else:
        second = moments.second - (1 - _SECOND_DECAY) * square * np.sign(moments.second - square)
    return rate * first / (np.sqrt(second) + _TAU), Moments(first, second)
