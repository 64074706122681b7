"""Runs the requests that arrive in one tick of the event loop as one batch, where that pays.

No request waits for another: what has arrived when the loop comes to it runs together. What takes long runs on a
thread, one at a time, so that the loop goes on answering everybody else.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edge_agent.errors import AgentError, RequestError
from edge_agent.http.datatypes import Array
from edge_agent.http.ports import Model

WAITING_MAX_S = 10.0  # what waited longer is refused: its caller has given up, or is about to
_BATCH_MAX_ROWS = 64  # beyond this a row of a small model costs the same
_TICK_S = 0.002  # after which the loop gets to everything else before the next batch
_THREAD_S = 0.010  # runs that take longer than this do so on the thread

Outputs = Mapping[str, Array]


@dataclass(slots=True, eq=False)
class Job:
    """One request that has passed its model's checks.

    Attributes:
        rows: In each of the inputs, >= 1.
        finish: Told the outputs, or why there are none; called once, on the loop.
    """

    model: Model
    inputs: Mapping[str, Array]
    rows: int
    started_s: float
    finish: Callable[["Job", Outputs | AgentError], None]


class TickBatcher:
    """Everything that waits for a model; to be used on the event loop only."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._slow: deque[Job] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, job: Job, *, is_alone: bool = False) -> None:
        """Run `job` soon.

        Args:
            job: What to run.
            is_alone: Whether no other can come in this turn of the loop: it runs at once.

        Raises:
            RequestError: 429, too many wait already.
        """
        if len(self._waiting) + len(self._slow) >= self._max_waiting:
            raise RequestError(f"{self._max_waiting} requests are waiting already: try again later", status=429)
        if job.rows * job.model.row_s > _THREAD_S:
            self._slow.append(job)
            if not self._tasks:
                task = asyncio.get_running_loop().create_task(self._work())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            return
        if is_alone and not self._waiting:
            job.finish(job, _infer(job))
            return
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(job)

    def _flush(self) -> None:
        begun_s = now_s = time.perf_counter()
        while self._waiting and now_s - begun_s < _TICK_S:
            _run(self._take(), now_s)
            now_s = time.perf_counter()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)

    def _take(self) -> list[Job]:
        """Return the oldest job and those that can run with it."""
        waiting = self._waiting
        batch = [waiting.popleft()]
        model = batch[0].model
        if not waiting or not model.batching_pays:
            return batch
        rows, others = batch[0].rows, deque[Job]()
        while waiting:
            job = waiting.popleft()
            if job.model is model and rows + job.rows <= _BATCH_MAX_ROWS:
                rows += job.rows
                batch.append(job)
            else:
                others.append(job)
        self._waiting = others
        return batch

    async def _work(self) -> None:
        """Run what takes long, one job after the other."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "inference")
        while self._slow:
            job = self._slow.popleft()
            if not _is_late(job, time.perf_counter()):
                found = await asyncio.get_running_loop().run_in_executor(self._thread, _infer, job)
                job.finish(job, found)


def _run(batch: Sequence[Job], now_s: float) -> None:
    batch = [job for job in batch if not _is_late(job, now_s)]
    outputs = _infer_together(batch) if len(batch) > 1 else None
    if outputs is None:
        for job in batch:
            job.finish(job, _infer(job))
        return
    start = 0
    for job in batch:
        end = start + job.rows
        job.finish(job, {name: array[start:end] for name, array in outputs.items()})
        start = end


def _infer_together(batch: Sequence[Job]) -> Outputs | None:
    """Return the outputs of all; None where they cannot be had together, and each is to run alone."""
    model = batch[0].model
    inputs = {name: np.concatenate([job.inputs[name] for job in batch]) for name in batch[0].inputs}
    try:
        outputs = model.run(inputs)
    except AgentError:  # one of them is to blame
        return None
    rows = sum(job.rows for job in batch)
    return outputs if all(array.ndim and len(array) == rows for array in outputs.values()) else None


def _infer(job: Job) -> Outputs | AgentError:
    try:
        return job.model.run(job.inputs)
    except AgentError as error:
        return error


def _is_late(job: Job, now_s: float) -> bool:
    if now_s - job.started_s <= WAITING_MAX_S:
        return False
    job.finish(job, RequestError(f"the request waited for {WAITING_MAX_S:g} s: this device is busy", status=503))
    return True
