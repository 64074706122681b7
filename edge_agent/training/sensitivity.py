"""Measures what one sample can add to a clipped sum, and refuses a step that does not bound it.

Catches mistakes, not malice: a step could know the data that it is measured with.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.errors import StalledError
from models.tensors.spec import TensorSpec

_Array = npt.NDArray[Any]
ClippedSum = Callable[[_Array, _Array, float], npt.NDArray[np.float64]]  # x, y, clipping norm -> flat sum

ROWS = 8  # so few that the float32 rounding of their sum stays far below the tolerance
TOLERANCE = 1e-3  # of the clipping norm; the noise is as much larger
_NO_CLIPPING = 1e6  # above any gradient of data of unit scale


def check_sensitivity(clipped_sum: ClippedSum, first: tuple[_Array, _Array], second: tuple[_Array, _Array]) -> None:
    """Measure `clipped_sum` on the samples `first`, one removed or replaced by its peer in `second` at a time.

    Raises:
        StalledError: A sample alone or removed counts for more than the clipping norm C, or replaced for more
            than 2 C; or no gradient is there to be clipped.
    """
    x, y = first
    unclipped = [_norm(clipped_sum(x[i : i + 1], y[i : i + 1], _NO_CLIPPING)) for i in range(len(x))]
    clipping_norm = max(unclipped) / 4  # so that at least one of the gradients must be clipped
    if not 0 < clipping_norm < _NO_CLIPPING / 4:
        raise StalledError(
            f"the training step: the largest gradient of random data has norm {max(unclipped)}: nothing to measure"
        )
    whole = clipped_sum(x, y, clipping_norm)
    for i in range(len(x)):
        kept = np.arange(len(x)) != i
        alone = clipped_sum(x[i : i + 1], y[i : i + 1], clipping_norm)
        removed = whole - clipped_sum(x[kept], y[kept], clipping_norm)
        replaced = whole - clipped_sum(_replaced(x, second[0], i), _replaced(y, second[1], i), clipping_norm)
        for change, bound, what in ((alone, 1, "alone"), (removed, 1, "removed"), (replaced, 2, "replaced")):
            if not _norm(change) <= bound * clipping_norm * (1 + TOLERANCE):
                raise StalledError(
                    f"the training step does not clip: a sample {what} counts for {_norm(change) / clipping_norm:.3f} "
                    f"clipping norms, at most {bound} is allowed"
                )


def random_rows(spec: TensorSpec, count: int, generator: np.random.Generator) -> _Array:
    """Return `count` rows of `spec`: floats of unit scale, integers in {0, 1}, which every vocabulary holds."""
    shape = (count, *spec.row_shape)
    if spec.dtype.startswith("float"):
        return generator.standard_normal(shape).astype(spec.dtype)
    return generator.integers(0, 2, shape).astype(spec.dtype)


def _replaced(rows: _Array, others: _Array, i: int) -> _Array:
    changed = rows.copy()
    changed[i] = others[i]
    return changed


def _norm(vector: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(vector))
