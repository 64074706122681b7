"""Which updates count, and what they come to. Pure."""

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.contract.privacy import Uplink
from models.tensors.layout import Vector
from models.tensors.norms import l2_norm
from models.tensors.uplink import decode_update

Floats: TypeAlias = npt.NDArray[np.float64]

_BLOCK = 1 << 16  # values


def check_update(data: bytes, *, size: int, norm_limit: float, uplink: Uplink = "float32") -> Vector | str:
    """Return the update in `data`, shape (size,), float32, or the reason why it does not count.

    What is beyond these checks cannot harm by its size: weights are uniform and the norm is bounded. The
    norm itself stays out of the reason, since it derives from private data.
    """
    try:
        update = decode_update(data, uplink, size=size)
    except ValueError as error:
        return str(error)
    norm = l2_norm(update)
    if not math.isfinite(norm):
        return "holds NaN or infinity"
    if norm > norm_limit:
        return f"L2 norm is above the limit of {norm_limit:g}"
    return update


class SumFold:
    """The sum of updates with equal weight, folded as they arrive: memory does not grow with the cohort.

    Attributes:
        sum: Shape (size,), float64.
        count: Updates in it.
    """

    def __init__(self, size: int) -> None:
        self.sum = np.zeros(size, np.float64)
        self.count = 0

    def add(self, update: Vector) -> None:
        """Count one update, shape (size,), finite."""
        self.sum += update
        self.count += 1

    def finish(self, denominator: float) -> Floats:
        """Return the sum over `denominator`, in the sum's own memory: the fold is over."""
        return np.divide(self.sum, denominator, out=self.sum)


def move(parameters: Vector, step: Floats) -> Vector:
    """Return `parameters` moved by `step`, both shape (n,); float32."""
    moved = np.empty(parameters.size, np.float32)
    for start in range(0, moved.size, _BLOCK):  # no second vector of float64
        block = slice(start, start + _BLOCK)
        moved[block] = parameters[block] + step[block]
    return moved
