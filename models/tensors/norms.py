"""Norms and clipping of updates."""

import numpy as np

from models.tensors.layout import Vector


def l2_norm(vector: Vector) -> float:
    """Return the L2 norm of `vector`, shape (n,), summed in float64."""
    return float(np.linalg.norm(vector.astype(np.float64)))
