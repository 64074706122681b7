"""Norms and clipping of updates."""

import math

import numpy as np

from models.tensors.layout import Vector

_BLOCK = 1 << 15  # values at once, which stay in the processor's cache
_BELOW_ONE = 1 - 2.0**-22


def l2_norm(vector: Vector) -> float:
    """Return the L2 norm of `vector`, shape (n,), summed in float64; finite exactly if all values are."""
    blocks = (vector[start : start + _BLOCK].astype(np.float64) for start in range(0, vector.size, _BLOCK))
    return math.sqrt(sum(float(block @ block) for block in blocks))


def clip_norm(vector: Vector, limit: float) -> Vector:
    """Return `vector`, shape (n,), finite, scaled down to an L2 norm of at most `limit`, > 0; as it is where it fits."""
    clipped, norm = vector, l2_norm(vector)
    while norm > limit:  # once, and again where float32 rounds the norm up
        clipped = (clipped * np.float64(limit / norm * _BELOW_ONE)).astype(np.float32)
        norm = l2_norm(clipped)
    return clipped
