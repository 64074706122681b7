"""What a hostile minority cannot move far: the rules of `rule.py`, over a round's updates. Pure.

Updates are read in blocks of columns, so that memory is bounded by a block whatever the cohort. The order of rows
must stay the same from block to block, and is of no other account.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fl_server.rounds.rule import Aggregation

_Floats: TypeAlias = npt.NDArray[np.float64]
_Rows: TypeAlias = npt.NDArray[np.intp]
Block: TypeAlias = npt.NDArray[np.float32]  # shape (updates, columns)
ReadColumns: TypeAlias = Callable[[int, int], Block]  # start, stop -> these columns; the block is overwritten

_BLOCK_VALUES = 1 << 21  # 8 MiB of float32


def aggregate(read: ReadColumns, *, count: int, size: int, aggregation: Aggregation) -> _Floats:
    """Return the step that `aggregation` makes of `count` finite updates, shape (size,), float64.

    Raises:
        ValueError: Fewer updates than the rule needs.
    """
    if count < aggregation.least_updates:
        raise ValueError(f"{aggregation.rule} needs {aggregation.least_updates} updates, there are {count}")
    byzantine = aggregation.byzantine
    rows: _Rows = np.arange(count)
    if aggregation.rule == "multi-krum":
        rows = choose_nearest(compute_gram(read, count=count, size=size), byzantine)
    elif aggregation.rule == "norm-filter":
        rows = choose_shortest(compute_squares(read, count=count, size=size), byzantine)
    trimmed = {"median": (count - 1) // 2, "trimmed-mean": byzantine}.get(aggregation.rule, 0)
    step = np.empty(size)
    for columns in _split(count, size):
        block = read(columns.start, columns.stop)
        if trimmed:
            block.sort(axis=0)
            block = block[trimmed : count - trimmed]  # of the median, the middle one or the middle two
        else:
            block = block[rows]
        block.mean(axis=0, dtype=np.float64, out=step[columns])
    return step


def choose_nearest(gram: _Floats, byzantine: int) -> _Rows:
    """Return the rows that multi-Krum keeps, n - f - 2 of them, by the products of all updates, shape (n, n)."""
    squares = gram.diagonal()
    distances = squares[:, np.newaxis] + squares - 2 * gram
    np.fill_diagonal(distances, np.inf)
    kept = len(gram) - byzantine - 2
    scores = np.sort(distances, axis=1)[:, :kept].sum(axis=1)
    return np.argsort(scores, kind="stable")[:kept]


def choose_shortest(squares: _Floats, byzantine: int) -> _Rows:
    """Return the rows without the `byzantine` longest updates, by their squared norms, shape (n,)."""
    return np.argsort(squares, kind="stable")[: len(squares) - byzantine]


def compute_gram(read: ReadColumns, *, count: int, size: int) -> _Floats:
    """Return the products of all pairs of updates, shape (count, count), summed in float64."""
    gram = np.zeros((count, count))
    for columns in _split(count, size):
        block = read(columns.start, columns.stop).astype(np.float64)
        gram += block @ block.T
    return gram


def compute_squares(read: ReadColumns, *, count: int, size: int) -> _Floats:
    """Return the squared L2 norms of all updates, shape (count,), summed in float64."""
    squares = np.zeros(count)
    for columns in _split(count, size):
        block = read(columns.start, columns.stop).astype(np.float64)
        squares += np.einsum("rc,rc->r", block, block)
    return squares


def _split(count: int, size: int) -> Iterator[slice]:
    width = max(1, _BLOCK_VALUES // count)
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))
