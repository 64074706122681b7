"""Randomness that protects somebody: Gaussian noise and Poisson draws from the operating system's entropy.

A Gaussian number computed in floating point betrays by its last bits what it was added to (Mironov 2012).
Each value here is the sum of 2n = 4 independent draws over sqrt(2n), so that an attacker must search
the inputs of all of them together: 2^(53 (2n - 1)) = 2^159 combinations.

Source:
    Holohan & Braghin 2021, "Secure Random Sampling in Differential Privacy", arXiv:2107.10138; the same
    construction with the same n as Opacus's secure mode.
"""

import math
import os
from collections.abc import Callable
from decimal import Decimal
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Entropy: TypeAlias = Callable[[int], bytes]  # number of bytes -> that many; only a test passes its own

_DRAWS = 4  # 2n
_BLOCK = 1 << 15  # pairs of values at once: the arrays stay in the processor's cache


def draw_gaussian(count: int, standard_deviation: float, entropy: Entropy = os.urandom) -> npt.NDArray[np.float64]:
    """Return `count` independent values of N(0, `standard_deviation`^2), shape (count,), float64."""
    values = np.empty(2 * math.ceil(count / 2))
    for start in range(0, values.size, 2 * _BLOCK):
        block = values[start : start + 2 * _BLOCK]
        _fill_gaussian(block, entropy)
    return values[:count] * standard_deviation


def draw_poisson(count: int, sampling_rate: Decimal, entropy: Entropy = os.urandom) -> npt.NDArray[np.bool_]:
    """Return which of `count` samples take part, each independently with `sampling_rate`; shape (count,).

    The rate is rounded down to a multiple of 2^-53: what is claimed is never less than what was drawn.
    """
    return _draw_integers(count, entropy) < int(sampling_rate * (1 << 53))


def _fill_gaussian(block: npt.NDArray[np.float64], entropy: Entropy) -> None:
    """Fill `block`, of even length, with N(0, 1) by Box-Muller: cosines in one half, sines in the other.

    The two values that share their draws are distinct values of the block, never parts of one.
    """
    pairs = block.size // 2
    # In (0, 1], never 0: the logarithm is finite. Both steps are exact in float64.
    uniform = (_draw_integers(2 * _DRAWS * pairs, entropy) + 1) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[: _DRAWS * pairs]))
    angle = 2 * math.pi * uniform[_DRAWS * pairs :]
    for half, wave in ((block[:pairs], np.cos(angle)), (block[pairs:], np.sin(angle))):
        np.sum((radius * wave).reshape(_DRAWS, pairs), axis=0, out=half)
    block /= math.sqrt(_DRAWS)


def _draw_integers(count: int, entropy: Entropy) -> npt.NDArray[np.uint64]:
    """Return `count` integers, uniform in [0, 2^53)."""
    return np.frombuffer(entropy(8 * count), np.dtype("<u8")) >> np.uint64(11)
