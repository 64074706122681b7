"""Norms and clipping of updates."""

import math

import numpy as np

from models.tensors.layout import Vector

_BLOCK = 1 << 15  # values at once, which stay in the processor's cache


def l2_norm(vector: Vector) -> float:
    """Return the L2 norm of `vector`, shape (n,), summed in float64; finite exactly if all values are."""
    blocks = (vector[start : start + _BLOCK].astype(np.float64) for start in range(0, vector.size, _BLOCK))
    return math.sqrt(sum(float(block @ block) for block in blocks))
