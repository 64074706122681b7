"""Child processes for what a hostile file or message might do to the one that serves: crash, fill the memory, never end.

What a child imported is gone with it, too: libraries that are needed once a day take no memory in between.
"""

import contextlib
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from edge_agent.errors import StalledError, TransientError

_SAID_MAX_CHARS = 500
_SAID_MAX_BYTES = 4096
NICENESS = 15  # what answers goes first; on a busy core this still gets 3 %, and deadlines know it


class DeadlineError(TransientError):
    """A child was ended because it took too long; `cpu_s` is how much processor time it got."""

    def __init__(self, message: str, *, cpu_s: float) -> None:
        super().__init__(message)
        self.cpu_s = cpu_s


def run_child(module: str, *arguments: str, given: bytes = b"", deadline_s: float) -> bytes:
    """Run `python -m module` with `given` as its input and return its output; blocks.

    Args:
        module: What is run, with `arguments`.
        arguments: On its command line.
        given: Its standard input.
        deadline_s: After which it is ended.

    Raises:
        StalledError: It ended with an exit code other than 0; the message is what it said, or how it ended.
        DeadlineError: It took longer than `deadline_s`.
        TransientError: This machine cannot start a process now.
    """
    with start_child(module, arguments) as child:
        try:
            said, _ = child.communicate(given, deadline_s)
        except subprocess.TimeoutExpired as error:
            cpu_s = read_cpu_s(child.pid)
            child.kill()
            raise DeadlineError(f"not done within {deadline_s:g} s", cpu_s=cpu_s) from error
    _check_end(child.returncode, said)
    return said


class Copy:
    """A copy of this process, which has imported already what is to be done in it; ended with `close`.

    This process must have no second thread yet: its copy would wait for that one's locks.
    """

    def __init__(self, work: Callable[[], int], *, deadline_s: float) -> None:
        """Begin.

        Args:
            work: Returns an exit code, and prints the reason if it is not 0.
            deadline_s: After which it is ended.

        Raises:
            TransientError: This machine cannot start a process now.
        """
        self._deadline_s, self._ends_s = deadline_s, time.monotonic() + deadline_s
        sys.stdout.flush()  # or the copy would say it, too
        self._said, said = os.pipe()
        self._code: int | None = None
        try:
            self._pid = os.fork()
        except OSError as error:
            os.close(self._said)
            os.close(said)
            raise TransientError(f"no process can be started: {error.strerror or error}") from error
        if self._pid == 0:
            _be_copy(work, said)
        os.close(said)

    def wait(self) -> None:
        """Return when it has done its work; raises as `run_child`."""
        said = b""
        while part := self._read():
            said = (said + part)[:_SAID_MAX_BYTES]
        _, status = os.waitpid(self._pid, 0)
        self._code = os.waitstatus_to_exitcode(status)
        _check_end(self._code, said)

    def close(self) -> None:
        """End it, if it has not ended."""
        os.close(self._said)
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _read(self) -> bytes:
        """Return what it says next; empty when it has ended."""
        left_s = max(0.0, self._ends_s - time.monotonic())
        if not select.select([self._said], [], [], left_s)[0]:
            raise DeadlineError(f"not done within {self._deadline_s:g} s", cpu_s=read_cpu_s(self._pid))
        return os.read(self._said, _SAID_MAX_BYTES)


def bound_this_process(*, memory_bytes: int, cpu_s: int, writes: bool) -> None:
    """Bound what this child may take, should its parent be gone too; to be called before it touches anything.

    Args:
        memory_bytes: Address space beyond what it has now; NumPy and onnxruntime take 0.2 GiB.
        cpu_s: Processor time; `extend_cpu_limit` gives it more.
        writes: Whether it may write files.
    """
    has_bytes = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    forbid_core_dumps()
    extend_cpu_limit(cpu_s)
    limits = {resource.RLIMIT_AS: has_bytes + memory_bytes}
    if not writes:
        limits[resource.RLIMIT_FSIZE] = 0
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (allowed, allowed))


def extend_cpu_limit(cpu_s: int) -> None:
    """Let this child take `cpu_s` of processor time from now on, and end it then."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = math.ceil(time.process_time()) + cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def forbid_core_dumps() -> None:
    """Have a crash of this process write nothing of its memory, such as keys and samples, to disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def start_child(module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Return `python -m module` with pipes as its input and output; raises TransientError."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-B", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise TransientError(f"no process can be started: {error.strerror or error}") from error
    with contextlib.suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, child.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    return child


def _be_copy(work: Callable[[], int], said: int) -> NoReturn:
    """Do `work` with `said` as the standard output, and end without what this process would do at its end."""
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for file, number in ((nothing, 0), (said, 1), (nothing, 2)):
            os.dup2(file, number)
        code = work()
        sys.stdout.flush()
    finally:
        os._exit(code)


def _check_end(code: int, said: bytes) -> None:
    """Raise StalledError unless `code` is 0."""
    if code:
        reason = " ".join(said.decode(errors="replace").split())[:_SAID_MAX_CHARS]
        raise StalledError(reason or describe_end(code))


def read_cpu_s(pid: int) -> float:
    """Return how much processor time a process has had; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe_end(code: int) -> str:
    """Return in words how a child ended."""
    if code > 0:
        return f"the process it was tried in ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the process it was tried in was ended by {name}"
