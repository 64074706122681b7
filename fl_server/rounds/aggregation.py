"""Which updates count, and what they come to. Pure."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.tensors.layout import Vector
from models.tensors.norms import l2_norm

UPDATE = "update"


def check_update(arrays: Mapping[str, npt.NDArray[Any]], *, size: int, norm_limit: float) -> Vector | str:
    """Return the update in `arrays`, shape (size,), float32, or the reason why it does not count.

    What is beyond these checks cannot harm by its size: weights are uniform and the norm is bounded. The
    norm itself stays out of the reason, since it derives from private data.
    """
    if set(arrays) != {UPDATE}:
        return f"arrays {sorted(arrays)!r:.200}, expected [{UPDATE!r}]"
    update = arrays[UPDATE]
    if update.dtype != np.float32:
        return f"dtype {update.dtype}, expected float32"
    if update.shape != (size,):
        return f"shape {update.shape!r:.80}, expected ({size},)"
    if not np.isfinite(update).all():
        return "holds NaN or infinity"
    if l2_norm(update) > norm_limit:
        return f"L2 norm is above the limit of {norm_limit:g}"
    return update


class MeanFold:
    """The mean of updates with equal weight, folded as they arrive: memory does not grow with the cohort."""

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, np.float64)
        self.count = 0

    def add(self, update: Vector) -> None:
        """Count one update, shape (size,), finite."""
        self._sum += update
        self.count += 1

    def apply(self, parameters: Vector) -> Vector:
        """Return `parameters` moved by the mean, shape (size,), float32; unchanged where nothing was added."""
        if self.count == 0:
            return parameters
        moved: Vector = (parameters + self._sum / self.count).astype(np.float32)
        return moved
