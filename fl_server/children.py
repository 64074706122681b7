"""Child processes of the coordinator: logged to a file, watched, ended by pid.

The kernel kills them with the coordinator, however that ends, so that a restart finds their ports free.
"""

import asyncio
import ctypes
import logging
import os
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 3.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 30.0
STEADY_S = 60.0  # a child that ran this long starts its backoff anew
LINE_MAX_BYTES = 1 << 20  # of a child's standard output
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@asynccontextmanager
async def running(
    name: str,
    command: Sequence[str],
    *,
    log_path: Path,
    environment: Mapping[str, str] | None = None,
    piped: bool = False,
) -> AsyncIterator[Process]:
    """Run `command` while the block lasts; what it says goes to `log_path`.

    Args:
        name: What logs call it.
        command: Program and arguments.
        log_path: Is appended to.
        environment: Variables over the coordinator's own.
        piped: Whether the caller talks to it over standard input and output; standard error is logged still.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE if piped else DEVNULL,
            stdout=PIPE if piped else log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            limit=LINE_MAX_BYTES,
            start_new_session=True,  # Ctrl-C reaches the coordinator alone, which then stops its children in order
            preexec_fn=die_with_parent,
        )
    logger.info("started %s, pid %d", name, process.pid)
    try:
        yield process
    finally:
        await _stop(process)
        logger.info("%s ended with code %s", name, process.returncode)


async def keep_running(
    name: str, command: Sequence[str], *, log_path: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run `command` again whenever it ends, with growing pauses, until cancelled."""
    pause_s = BACKOFF_MIN_S
    while True:
        started = time.monotonic()
        async with running(name, command, log_path=log_path, environment=environment) as process:
            await process.wait()
        if time.monotonic() - started >= STEADY_S:
            pause_s = BACKOFF_MIN_S
        logger.warning("%s is started again in %.1f s; its log: %s", name, pause_s, log_path)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, BACKOFF_MAX_S)


async def _stop(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
