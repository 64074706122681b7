"""Compares a challenger's answers with the champion's, on a thread of its own, after the caller has been answered."""

import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_agent.errors import AgentError
from edge_agent.inference.backend import Array

log = logging.getLogger(__name__)

WAITING_MAX = 64  # comparisons; what comes on top is dropped and counted
WAITING_MAX_BYTES = 16 * 1024 * 1024  # of their tensors
_SAME_RELATIVE = 1e-2  # outputs of one value a row agree within this


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowSnapshot:
    """What the comparisons found so far.

    Attributes:
        rows: Compared.
        agreeing: Rows in which every output has its largest value at the same place; an output of one value
            a row agrees if it is the same within a hundredth.
        largest_difference: Between two values of the same place, over all rows and outputs.
        failures: Requests that the champion answered and the challenger did not.
        dropped: Requests that were not compared, because too many waited.
    """

    rows: int = 0
    agreeing: int = 0
    largest_difference: float = 0.0
    failures: int = 0
    dropped: int = 0


class Compared(Protocol):
    """What answers in the shadow; a `ServedModel`, or one in another process."""

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise AgentError if it does not take `inputs`."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name; raises AgentError."""
        ...


class Shadow:
    """One challenger beside one champion."""

    def __init__(self, challenger: Compared) -> None:
        self._challenger = challenger
        self._waiting: queue.SimpleQueue[tuple[Mapping[str, Array], Mapping[str, Array], int] | None] = (
            queue.SimpleQueue()
        )
        self._waiting_bytes = 0
        self._lock = threading.Lock()  # for what both threads count
        self._dropped = 0
        self._found = ShadowSnapshot()
        self._thread: threading.Thread | None = None

    def offer(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Compare later what the champion made of `inputs`; neither may change any more. Never blocks or raises."""
        size_bytes = sum(array.nbytes for array in inputs.values()) + sum(array.nbytes for array in outputs.values())
        with self._lock:
            if self._waiting.qsize() >= WAITING_MAX or self._waiting_bytes + size_bytes > WAITING_MAX_BYTES:
                self._dropped += 1
                return
            self._waiting_bytes += size_bytes
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
            self._thread.start()
        self._waiting.put((inputs, outputs, size_bytes))

    def snapshot(self) -> ShadowSnapshot:
        """Return what was found so far."""
        found = self._found
        return ShadowSnapshot(
            rows=found.rows,
            agreeing=found.agreeing,
            largest_difference=found.largest_difference,
            failures=found.failures,
            dropped=self._dropped,
        )

    def close(self) -> None:
        """End the thread after what it is at; what still waits is compared first."""
        self._waiting.put(None)

    def finish(self, timeout_s: float) -> None:
        """As `close`, and return when the thread has ended, or after `timeout_s`."""
        self.close()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            inputs, outputs, size_bytes = item
            self._compare(inputs, outputs)
            with self._lock:
                self._waiting_bytes -= size_bytes
            del inputs, outputs, item  # not held while nothing comes

    def _compare(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        found = self._found
        try:
            self._challenger.check(inputs)
            rows, agreeing, difference = compare_outputs(outputs, self._challenger.run(inputs))
        except AgentError as error:
            if found.failures == 0:
                log.warning("the challenger failed where the champion answered: %s", error)
            rows, agreeing, difference, failures = 0, 0, 0.0, 1
        else:
            failures = 0
        self._found = ShadowSnapshot(
            rows=found.rows + rows,
            agreeing=found.agreeing + agreeing,
            largest_difference=max(found.largest_difference, difference),
            failures=found.failures + failures,
        )


def compare_outputs(champion: Mapping[str, Array], challenger: Mapping[str, Array]) -> tuple[int, int, float]:
    """Return how many rows there are, how many agree, and the largest difference of two values.

    Args:
        champion: Outputs by name, each of shape (rows, ...).
        challenger: The same names, shapes and dtypes; a NaN differs from everything but a NaN.
    """
    rows, agrees, largest = 0, None, 0.0
    for name, array in champion.items():
        rows = len(array)
        ours, theirs = array.reshape(rows, -1), challenger[name].reshape(rows, -1)
        if array.dtype.kind == "O":  # strings have no distance
            same = (ours == theirs).all(axis=1)
            agrees = same if agrees is None else agrees & same
            continue
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        same = (
            ours.argmax(axis=1) == theirs.argmax(axis=1)
            if ours.shape[1] > 1
            else np.isclose(ours, theirs, rtol=_SAME_RELATIVE, equal_nan=True)[:, 0]
        )
        agrees = same if agrees is None else agrees & same
        with np.errstate(invalid="ignore"):  # infinity - infinity
            difference = np.abs(ours - theirs)
        largest = max(largest, float(np.nanmax(difference, initial=0.0)))
    return rows, 0 if agrees is None else int(agrees.sum()), largest
