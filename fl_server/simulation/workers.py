"""The virtual devices: a few processes of the device's own code, which the round driver reaches over pipes.

    driver --orders--> VirtualDevices --one of N pipes--> python -m edge_agent.simulated --updates--> back

Coordinator and device never import each other, so the device's code runs where it does otherwise: in processes of
its own. Replies are read in the order of the devices, whichever process was faster: a sum of floats depends on it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from fl_server.errors import RunError
from fl_server.rounds.flower import Reply
from models.contract.encoding import build_json, parse_json
from models.contract.simulation import UPDATE_LENGTH_BYTES, SimulationJob, VirtualRound
from models.tensors.layout import Vector, build_vector_bytes

MODULE = "edge_agent.simulated"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # as the agent starts its training process


class Worker:
    """One process that plays some of the devices."""

    def __init__(self, job: SimulationJob, *, log_path: Path) -> None:
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **_ONE_THREAD},
            )
        self._write(build_json(job) + b"\n")

    def ask(self, envelopes: Mapping[str, bytes], parameters: bytes) -> None:
        """Have the devices of `envelopes` train on `parameters`, 4 bytes each, one after the other."""
        self._write(build_json(VirtualRound(envelopes=dict(envelopes))) + b"\n" + parameters)

    def read(self) -> bytes:
        """Return the next update, as it travels; raises RunError."""
        updates = _get(self._process.stdout)
        length = updates.read(UPDATE_LENGTH_BYTES)
        update = updates.read(int.from_bytes(length, "little"))
        if len(length) < UPDATE_LENGTH_BYTES or len(update) < int.from_bytes(length, "little"):
            raise self._explain()
        return update

    def close(self) -> None:
        """End the process; it holds nothing that anybody needs."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                _get(stream).close()

    def _write(self, words: bytes) -> None:
        stream = _get(self._process.stdin)
        try:
            stream.write(words)
            stream.flush()
        except BrokenPipeError as error:
            raise self._explain() from error

    def _explain(self) -> RunError:
        code = self._process.wait()
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return RunError(f"a process of virtual devices ended with code {code}: {lines[-1] if lines else 'no word'}")


class VirtualDevices:
    """The devices of one run, as the round driver sees them: node `i` is the i-th device by name."""

    def __init__(self, job: SimulationJob, *, scratch_dir: Path) -> None:
        """Prepare; no process runs yet.

        Args:
            job: Of all devices; each process is told of its own alone.
            scratch_dir: For what the processes say on standard error.
        """
        self._job, self._scratch_dir = job, scratch_dir
        self._names = sorted(job.samples)
        self._workers: list[Worker] = []
        self._closing = ExitStack()
        self._asked: list[int] = []

    def __enter__(self) -> Self:
        count = min(len(os.sched_getaffinity(0)), len(self._names))
        for number in range(count):
            samples = {name: self._job.samples[name] for name in self._names[number::count]}
            worker = Worker(replace(self._job, samples=samples), log_path=self._scratch_dir / f"worker-{number}.log")
            self._closing.callback(worker.close)
            self._workers.append(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def list_online(self) -> set[int]:
        """Return all nodes: a virtual device is never away."""
        return set(range(len(self._names)))

    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None:
        """Hand every process the orders of its devices."""
        del lifetime_s
        self._asked = sorted(envelopes)
        for number, worker in enumerate(self._workers):
            own = {self._names[node]: envelopes[node] for node in self._asked if self._place(node) == number}
            if own:
                worker.ask(own, build_vector_bytes(parameters))

    def collect(self) -> Iterator[Reply]:
        """Yield every reply, in the order of the nodes, as soon as it is there."""
        for node in self._asked:
            yield Reply(node_id=node, update=self._workers[self._place(node)].read())
        self._asked = []

    def forget(self) -> None:
        """Do nothing: all was answered."""

    def _place(self, node: int) -> int:
        return node % len(self._workers)


def play(job: bytes, log_path: Path, device_id: str, envelope: bytes, parameters: bytes) -> bytes:
    """Return the update of one device of `job`, from a process that is started once and ends with this one."""
    worker = _keep_worker(job, log_path)
    worker.ask({device_id: envelope}, parameters)
    return worker.read()


@lru_cache(maxsize=1)
def _keep_worker(job: bytes, log_path: Path) -> Worker:
    return Worker(parse_json(job, SimulationJob, max_bytes=len(job)), log_path=log_path)


def measure_mb() -> float:
    """Return the memory resident in the largest process that plays devices now, MB."""
    sizes = [0]
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if MODULE in process.cmdline():
                sizes.append(process.memory_info().rss)
    return max(sizes) / 1e6


def _get(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # a pipe was asked for
    return stream
