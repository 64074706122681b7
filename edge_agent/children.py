"""Child processes for what a hostile file or message might do to the one that serves: crash, fill the memory, never end.

What a child imported is gone with it, too: libraries that are needed once a day take no memory in between.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from edge_agent.errors import StalledError, TransientError

_SAID_MAX_CHARS = 500
NICENESS = 15  # what answers goes first; on a busy core this still gets 3 %, and deadlines know it


class DeadlineError(TransientError):
    """A child was ended because it took too long; `cpu_s` is how much processor time it got."""

    def __init__(self, message: str, *, cpu_s: float) -> None:
        super().__init__(message)
        self.cpu_s = cpu_s


def run_child(module: str, *arguments: str, given: bytes = b"", deadline_s: float, niceness: int = NICENESS) -> bytes:
    """Run `python -m module` with `given` as its input and return its output; blocks.

    Args:
        module: What is run, with `arguments`.
        arguments: On its command line.
        given: Its standard input.
        deadline_s: After which it is ended.
        niceness: Added to this process's own; 0 where somebody waits for it and nothing is served yet.

    Raises:
        StalledError: It ended with an exit code other than 0; the message is what it said, or how it ended.
        DeadlineError: It took longer than `deadline_s`.
        TransientError: This machine cannot start a process now.
    """
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
    with child:
        with contextlib.suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, child.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        try:
            said, _ = child.communicate(given, deadline_s)
        except subprocess.TimeoutExpired as error:
            cpu_s = _read_cpu_s(child.pid)
            child.kill()
            raise DeadlineError(f"not done within {deadline_s:g} s", cpu_s=cpu_s) from error
    if child.returncode:
        reason = " ".join(said.decode(errors="replace").split())[:_SAID_MAX_CHARS]
        raise StalledError(reason or _describe_end(child.returncode))
    return said


def bound_this_process(*, memory_bytes: int, cpu_s: int, writes: bool) -> None:
    """Bound what this child may take, should its parent be gone too; to be called before it touches anything.

    Args:
        memory_bytes: Address space; the interpreter with NumPy and onnxruntime takes 0.2 GiB.
        cpu_s: Processor time.
        writes: Whether it may write files.
    """
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_CORE: 0}
    if not writes:
        limits[resource.RLIMIT_FSIZE] = 0
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (allowed, allowed))


def _read_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _describe_end(code: int) -> str:
    if code > 0:
        return f"the process it was tried in ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the process it was tried in was ended by {name}"
