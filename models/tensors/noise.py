"""Randomness that protects somebody: Gaussian noise and Poisson draws from the operating system's entropy.

A Gaussian number computed in floating point betrays by its last bits what it was added to (Mironov 2012). So nothing
is added up before it lies on a grid: with both rounded to multiples of a power of two, sum and noise add exactly, and

    round(sum) + round(noise) = round(round(sum) + noise),

which is the Gaussian mechanism on the rounded sum, rounded again afterwards: its guarantee holds as it stands, for a
sample that counts for as much more as `build_grid` says. A cell of the grid is wide beside the distance of two values
that the ziggurat may draw, 2^-51 standard deviations up to four of them.

The bits are the keystream of AES-256 in counter mode, under a key that the operating system gives anew for each call
and that nothing keeps. That is as good as the system's own generator, which is itself such a cipher (ChaCha20) under a
key from the same entropy: who can tell the stream from random bits can read what AES encrypts, and one call stays far
below the 2^64 blocks at which a block cipher shows. It is twenty times as fast.

Source:
    Mironov 2012, "On Significance of the Least Significant Bits For Differential Privacy", for attack and grid.
    Marsaglia & Tsang 2000, "The Ziggurat Method for Generating Random Variables", with Doornik's 2005 correction: a
    layer and a place in it never share bits.
"""

import math
import os
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Entropy: TypeAlias = Callable[[int], bytes]  # number of bytes -> that many; only a test passes its own
_Floats: TypeAlias = npt.NDArray[np.float64]
_Integers: TypeAlias = npt.NDArray[np.int64]

_BLOCK = 15 << 10  # draws at once: fewer, and Python shows in the time; more, and each array is mapped anew
_KEY_BYTES, _COUNTER_BYTES = 32, 16
_ZEROS = memoryview(bytes(8 * _BLOCK))
GRID_SLACK = 2.0**-10

_LAYERS = 256
_TAIL = 3.6541528853610088  # where the lowest layer's box ends, if 256 layers have equal area
_PLACE_BITS = 53
_SPARE_LEAST, _SPARE_ONE_IN = 32, 64  # draws beyond those asked for: one in 150 must be replaced


class _Scratch(threading.local):
    """Arrays that a thread keeps for its draws: the system would else map and clear new ones, which takes longer."""

    def __init__(self) -> None:
        self.integers, self.is_outside = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.bool_)
        self.floats, self.ends = np.empty(_BLOCK), np.empty(_BLOCK)


_SCRATCH = _Scratch()


class Keystream:
    """Endless random bits under a key that `entropy` gives once."""

    def __init__(self, entropy: Entropy) -> None:
        key, counter = entropy(_KEY_BYTES), entropy(_COUNTER_BYTES)
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def __call__(self, size: int) -> bytes:
        return self._cipher.update(_ZEROS[:size] if size <= len(_ZEROS) else bytes(size))


def draw_gaussian(count: int, standard_deviation: float, entropy: Entropy = os.urandom) -> _Floats:
    """Return `count` independent values of N(0, `standard_deviation`^2), shape (count,), float64.

    Args:
        count: How many.
        standard_deviation: Of each.
        entropy: Gives the key of the bits.
    """
    values = draw_normal(count, Keystream(entropy))
    values *= standard_deviation
    return values


def build_grid(count: int, clipping_norm: float) -> float:
    """Return the distance of the grid's points, a power of two, for sums of `count` values.

    Rounding two such sums moves them apart by at most `GRID_SLACK` clipping norms.
    """
    return 2.0 ** math.floor(math.log2(GRID_SLACK * clipping_norm / math.sqrt(count)))


def add_on_grid(total: _Floats, noise: _Floats, grid: float) -> None:
    """Add `noise` onto `total`, each rounded to the grid; both are overwritten."""
    for values in (total, noise):
        np.multiply(values, 1 / grid, out=values)
        np.rint(values, out=values)
    np.add(total, noise, out=total)
    np.multiply(total, grid, out=total)


def draw_poisson(count: int, sampling_rate: Decimal, entropy: Entropy = os.urandom) -> npt.NDArray[np.bool_]:
    """Return which of `count` samples take part, each independently with `sampling_rate`; shape (count,).

    The rate is rounded down to a multiple of 2^-53: what is claimed is never less than what was drawn.
    """
    return _draw_integers(count, entropy) < int(sampling_rate * (1 << 53))


def draw_normal(count: int, entropy: Entropy) -> _Floats:
    """Return `count` independent values of N(0, 1), one draw each, by the ziggurat."""
    spare = _SPARE_LEAST + count // _SPARE_ONE_IN
    values = np.empty(count + spare)
    rejected = _keep_under_density(values, *_draw_from_layers(values, entropy), entropy)
    is_kept = np.ones(len(values), np.bool_)
    is_kept[rejected] = False
    spares = count + np.flatnonzero(is_kept[count:])
    rejected = rejected[: rejected.searchsorted(count)]
    replaced, left = rejected[: len(spares)], rejected[len(spares) :]
    values[replaced] = values[spares[: len(replaced)]]
    if left.size:
        values[left] = draw_normal(left.size, entropy)
    return values[:count]


def _draw_from_layers(values: _Floats, entropy: Entropy) -> tuple[_Integers, _Integers]:
    """Fill `values` with one draw each; return the indices of those that a height must decide on, and their layers.

    Of 64 bits, 8 choose one of 256 layers of equal area under the density, and 54 a place across it, sign included.
    Most places lie under the density at any height of their layer.
    """
    outside, outside_layers = [], []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        integers, is_outside = _SCRATCH.integers[: len(block)], _SCRATCH.is_outside[: len(block)]
        floats, ends = _SCRATCH.floats[: len(block)], _SCRATCH.ends[: len(block)]
        bits = np.frombuffer(entropy(8 * len(block)), np.dtype("<i8"))
        np.bitwise_and(bits, _LAYERS - 1, out=integers)
        _SCALES.take(integers, out=floats, mode="clip")
        _ENDS.take(integers, out=ends, mode="clip")
        np.right_shift(bits, 64 - _PLACE_BITS - 1, out=integers)  # in [-2^53, 2^53), exact in float64
        np.copyto(block, integers)
        np.multiply(block, floats, out=block)
        np.abs(block, out=floats)
        found = np.greater_equal(floats, ends, out=is_outside).nonzero()[0]
        outside.append(found + start)
        outside_layers.append(bits[found] & (_LAYERS - 1))
    return np.concatenate(outside), np.concatenate(outside_layers)


def _keep_under_density(values: _Floats, outside: _Integers, layers: _Integers, entropy: Entropy) -> _Integers:
    """Decide on the draws of `layers` at the indices `outside`; return the indices to be drawn again.

    Those of the lowest layer are replaced by values of the tail.
    """
    in_tail = outside[layers == 0]
    if in_tail.size:
        values[in_tail] = np.copysign(_draw_tail(in_tail.size, entropy), values[in_tail])
    low, high = _DENSITIES.take(layers), _DENSITIES.take(layers + 1)
    heights = low + (high - low) * _draw_uniform(outside.size, entropy)
    is_above = heights >= np.exp(-0.5 * values[outside] ** 2)
    return outside[is_above & (layers > 0)]


def _draw_tail(count: int, entropy: Entropy) -> _Floats:
    """Return values of N(0, 1) beyond the lowest box (Marsaglia 1964)."""
    beyond: _Floats = np.empty(0)
    while beyond.size < count:
        tried = np.log(_draw_uniform(count, entropy)) / -_TAIL
        is_kept = -2 * np.log(_draw_uniform(count, entropy)) > tried * tried
        beyond = np.append(beyond, tried[is_kept])
    return _TAIL + beyond[:count]


def _draw_uniform(count: int, entropy: Entropy) -> _Floats:
    """Return values in (0, 1], never 0: their logarithms are finite."""
    return (_draw_integers(count, entropy).astype(np.float64) + 1) * 2.0**-53


def _draw_integers(count: int, entropy: Entropy) -> npt.NDArray[np.uint64]:
    """Return `count` integers, uniform in [0, 2^53)."""
    return np.frombuffer(entropy(8 * count), np.dtype("<u8")) >> np.uint64(11)


def _build_layers() -> tuple[_Floats, _Floats]:
    """Return the ziggurat: where each layer ends, from the lowest up, and the density there.

    Layer 0 is a box of the common area, wider than the density's box of that height by as much as stands for the tail.
    """
    density = math.exp(-0.5 * _TAIL * _TAIL)
    area = _TAIL * density + math.sqrt(math.pi / 2) * math.erfc(_TAIL / math.sqrt(2))
    edges, densities = [area / density, _TAIL], [0.0, density]
    while len(edges) < _LAYERS:
        densities.append(densities[-1] + area / edges[-1])
        edges.append(math.sqrt(-2 * math.log(densities[-1])))
    return np.array([*edges, 0.0]), np.array([*densities, 1.0])


_EDGES, _DENSITIES = _build_layers()
_SCALES, _ENDS = _EDGES[:-1] * 2.0**-_PLACE_BITS, _EDGES[1:]
