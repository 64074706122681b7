"""A version's first run, in a process that may die: `python -m edge_agent.inference.sandbox VERSION_DIR`.

A graph can crash the runtime, ask for all memory or never end, and none of that can be caught from inside.
The child bounds itself before it opens anything, loads the version, and answers with zeros; it writes no file.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from edge_agent.errors import AgentError, StalledError, TransientError
from models.contract.errors import ContractError

DEADLINE_S = 30.0  # loading and three small runs; a model that needs longer is of no use on a device
_FREE_BYTES = 1024**3  # address space; interpreter and runtime take 0.2 GiB of it
_BYTES_PER_FILE_BYTE = 8  # a graph is read, parsed, packed and optimised
_SAID_MAX_BYTES = 2000


def try_in_sandbox(directory: Path, *, deadline_s: float = DEADLINE_S) -> None:
    """Return if the version in `directory` can be loaded and run; blocks.

    Raises:
        StalledError: It cannot; the message says how it failed.
        TransientError: This machine cannot start a process now.
    """
    command = [sys.executable, "-B", "-m", "edge_agent.inference.sandbox", str(directory)]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except OSError as error:
        raise TransientError(f"no process to try the version in: {error.strerror or error}") from error
    assert child.stdout is not None
    with child, child.stdout:
        try:
            code = child.wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            child.kill()
            raise StalledError(f"not loaded and run within {deadline_s:g} s") from error
        said = child.stdout.read(_SAID_MAX_BYTES).decode(errors="replace").strip()
    if code:
        raise StalledError(said or _describe_end(code))


def main() -> int:
    """Try the version in the folder that is the only argument; return the exit code."""
    directory = Path(sys.argv[1])
    try:
        size_bytes = sum(path.stat().st_size for path in directory.iterdir())
        _bound(_FREE_BYTES + _BYTES_PER_FILE_BYTE * size_bytes)
        from edge_agent.inference.model import load_version

        load_version(directory)
    except (AgentError, ContractError) as error:
        print(" ".join(str(error).split()))
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}")
        return 1
    except MemoryError:
        print("it asks for more memory than a model may have")
        return 1
    return 0


def _bound(memory_bytes: int) -> None:
    seconds = round(DEADLINE_S)  # should the parent be gone
    for limit, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (allowed, allowed))


def _describe_end(code: int) -> str:
    if code > 0:
        return f"it ended the process it was tried in, with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it ended the process it was tried in, by {name}"


if __name__ == "__main__":
    sys.exit(main())
