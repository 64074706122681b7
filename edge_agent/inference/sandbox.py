"""A version's first run, in a process that may die: `python -m edge_agent.inference.sandbox VERSION_DIR`.

A graph can crash the runtime, ask for all memory or never end, and none of that can be caught from inside.
The child bounds itself before it opens anything, loads the version, and answers zeros and its golden samples; it
writes no file.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge_agent.children import Copy, DeadlineError, bound_this_process, run_child
from edge_agent.errors import AgentError, StalledError, TransientError
from models.contract.errors import ContractError

DEADLINE_S = 50.0  # loading and a few small runs take 0.3 s of processor time, on a busy device 10 s
CPU_S = 30  # a model that needs more is of no use on a device
_BUSY_SHARE = 0.1  # of a processor; a version that got less has not shown anything
_FREE_BYTES = 1024**3
_BYTES_PER_FILE_BYTE = 8  # a graph is read, parsed, packed and optimised


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How slow a version may be: its median latency at most `max_ratio` times that of the version in `beside`."""

    beside: Path
    max_ratio: float


def try_in_sandbox(directory: Path, *, pace: Pace | None = None, deadline_s: float = DEADLINE_S) -> None:
    """Return if the version in `directory` can be loaded and run, and answers as it did where it was packaged; blocks.

    Args:
        directory: Of the version.
        pace: What it is measured by; None for nothing.
        deadline_s: For all of it.

    Raises:
        StalledError: It cannot; the message says how it failed.
        TransientError: This machine has no process or no time for it now.
    """
    arguments = [str(directory)] if pace is None else [str(directory), str(pace.beside), str(pace.max_ratio)]
    with _judging(deadline_s):
        run_child("edge_agent.inference.sandbox", *arguments, deadline_s=deadline_s)


@contextlib.contextmanager
def trying_in_copy(directory: Path) -> Iterator[Callable[[], None]]:
    """Try the version in `directory` as `try_in_sandbox`, in a copy of this process, which has one thread.

    It takes none of the time that a new process needs for its imports.

    Yields:
        What returns when the version has been loaded and run; raises as `try_in_sandbox`.
    """
    with contextlib.closing(Copy(partial(_try, directory, None), deadline_s=DEADLINE_S)) as copy:

        def wait() -> None:
            with _judging(DEADLINE_S):
                copy.wait()

        yield wait


@contextlib.contextmanager
def _judging(deadline_s: float) -> Iterator[None]:
    """Blame the version for not being done in time, unless it had no time."""
    try:
        yield
    except DeadlineError as error:
        if error.cpu_s < _BUSY_SHARE * deadline_s:
            raise TransientError(
                f"this device is too busy to try it: {error.cpu_s:.1f} s in {deadline_s:g} s"
            ) from error
        raise StalledError(f"not loaded and run within {deadline_s:g} s") from error


def bound_for(*directories: Path) -> None:
    """Bound this process to what it takes to run the versions in `directories`; raises OSError."""
    size_bytes = sum(path.stat().st_size for directory in directories for path in directory.iterdir())
    memory_bytes = _FREE_BYTES + _BYTES_PER_FILE_BYTE * size_bytes
    bound_this_process(memory_bytes=memory_bytes, cpu_s=CPU_S, writes=False)


def _try(directory: Path, pace: Pace | None) -> int:
    """Load and run the version, with this process bounded from now on; return the exit code."""
    try:
        bound_for(directory, *(() if pace is None else (pace.beside,)))
        from edge_agent.inference.model import load_version
        from edge_agent.inference.trial import check_latency, try_golden

        model = load_version(directory)
        golden = try_golden(model, directory)
        if pace is not None:
            check_latency(model, load_version(pace.beside), golden, max_ratio=pace.max_ratio)
    except (AgentError, ContractError) as error:
        print(error)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}")
    except MemoryError:
        print("it asks for more memory than a model may have")
    else:
        return 0
    return 1


if __name__ == "__main__":
    _paths, _ratio = [Path(name) for name in sys.argv[1:3]], sys.argv[3:]
    sys.exit(_try(_paths[0], Pace(beside=_paths[1], max_ratio=float(_ratio[0])) if _ratio else None))
