"""Starts and watches the training process: one at a time, expendable, never able to harm serving."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.errors import StalledError

_log = logging.getLogger(__name__)

LINE_MAX_BYTES = 64 * 1024  # an event has a few hundred bytes
_IDLE = 19
_END_TIMEOUT_S = 5.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the process may take.

    Attributes:
        niceness: 0 to 19; at 19 it also gets only what is idle of processor and disk.
        memory_bytes: Of its own, what it maps from files not counted: address space would count libraries, and what
            torch only reserves.
        cpu_s: Processor time, after which the kernel ends it.
    """

    niceness: int
    memory_bytes: int
    cpu_s: int


class Supervisor:
    """Runs `command` for one run at a time; belongs to one asyncio loop."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        bounds: Bounds,
        on_line: Callable[[str, bytes], None],
        on_exit: Callable[[str, str | None], None],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            command: Program and arguments.
            bounds: Of each process, from its first instruction.
            on_line: Called with the run and each line that the process prints.
            on_exit: Called with the run when its process is gone, and what ended it unless it ended well.
        """
        self._command = tuple(command)
        self._bounds = bounds
        self._on_line = on_line
        self._on_exit = on_exit
        self._run: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def run(self) -> str | None:
        """The run that has a process now."""
        return self._run

    async def start(
        self, run: str, job: bytes, *, patience_s: float, wait_for_refusal: Callable[[], Awaitable[str]]
    ) -> None:
        """Start a process for `run` with `job` on its stdin; nothing if the run has one, a process of another run ends.

        Args:
            run: What it is for.
            job: Its input.
            patience_s: It is ended when it has printed nothing for so long.
            wait_for_refusal: It is ended when this returns the reason for that.
        """
        if self._run == run:
            return
        await self.stop()
        self._run = run
        self._task = asyncio.create_task(self._supervise(run, job, patience_s, wait_for_refusal))

    async def stop(self) -> None:
        """End the process, if there is one; return when it is gone."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._run = None  # a task that was cancelled before its first step could not do it

    async def _supervise(
        self, run: str, job: bytes, patience_s: float, wait_for_refusal: Callable[[], Awaitable[str]]
    ) -> None:
        problem: str | None = "was ended by the agent"
        try:
            problem = await self._run_process(run, job, patience_s, wait_for_refusal)
        except OSError as error:
            problem = f"could not be started: {error.strerror or error}"
        except StalledError as error:
            problem = str(error)
        finally:
            self._run = None
            self._on_exit(run, problem)

    async def _run_process(
        self, run: str, job: bytes, patience_s: float, wait_for_refusal: Callable[[], Awaitable[str]]
    ) -> str | None:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            limit=LINE_MAX_BYTES,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        following = asyncio.create_task(self._follow(process, run, job, patience_s))
        watching = asyncio.ensure_future(wait_for_refusal())
        try:
            _bind(process, self._bounds)
            await asyncio.wait({following, watching}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result()
            return f"was ended, as this machine is not to train now: {watching.result()}"
        finally:
            following.cancel()
            watching.cancel()
            await _end(process)

    async def _follow(self, process: Process, run: str, job: bytes, patience_s: float) -> str | None:
        try:
            async with asyncio.timeout(patience_s):
                await _feed(process, job)
            while True:
                async with asyncio.timeout(patience_s):
                    line = await _read_line(process)
                    if not line:
                        return _describe(await process.wait())
                self._on_line(run, line)
        except TimeoutError as error:
            raise StalledError(f"was ended, as it said nothing for {patience_s:g} s") from error


async def _feed(process: Process, job: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # a process that died at once has its exit code to say so
        process.stdin.write(job)
        await process.stdin.drain()
    process.stdin.close()


async def _read_line(process: Process) -> bytes:
    assert process.stdout is not None
    try:
        return await process.stdout.readline()
    except ValueError as error:  # asyncio's word for a line beyond the limit
        raise StalledError(f"printed a line of more than {LINE_MAX_BYTES} bytes") from error


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _describe(code: int) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}, the device's log says why"


def _bind(process: Process, bounds: Bounds) -> None:
    """Have the process stay behind whatever else this machine does, and be the first to go when memory runs out."""
    pid = process.pid
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended already
        with _warning("oom_score_adj"):
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")
        for limit, most in ((resource.RLIMIT_DATA, bounds.memory_bytes), (resource.RLIMIT_CPU, bounds.cpu_s)):
            with _warning(f"limit {limit}"):
                _, hard = resource.prlimit(pid, limit)
                allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.prlimit(pid, limit, (allowed, hard))
        with _warning("niceness"):
            os.setpriority(os.PRIO_PROCESS, pid, bounds.niceness)
        if bounds.niceness == _IDLE:
            with _warning("idle scheduling"):
                os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))  # its reads and writes wait, too


@contextlib.contextmanager
def _warning(bound: str) -> Iterator[None]:
    """Let the other bounds hold where the machine does not grant one; a process that is gone is the caller's."""
    try:
        yield
    except (ProcessLookupError, FileNotFoundError):
        raise
    except OSError as error:
        _log.warning("the training process goes without %s: %s", bound, error.strerror or error)
