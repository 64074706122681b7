"""SIGKILL at the n-th change that a piece of work makes to the disk.

A child process counts what it does (opens for writing, renames, removals, new folders, syncs) through an audit
hook, and kills itself at the n-th of them.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.simulators.waiting import wait_until

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"})
_THREADS = Path("/proc/self/task")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def run_and_kill(work: Callable[[], object], *, at: int) -> bool:
    """Return whether a child that is killed at its `at`-th change of the disk lived to the end of `work`."""
    child = os.fork()
    if child == 0:
        try:
            _count_changes(at)
            work()
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must see it
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:  # the test was given up: its child must not outlive it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def run_settled(work: Callable[[], object]) -> None:
    """Do `work` here, and return once the threads that it started are gone.

    A thread that is just ending may hold a lock of OpenSSL's, and a child that is forked then waits for it for ever.
    """
    before = set(_THREADS.iterdir())
    work()
    wait_until(lambda: set(_THREADS.iterdir()) <= before, "the end of all threads")


def _count_changes(at: int) -> None:
    left = at
    sync = os.fsync

    def change() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def count(event: str, arguments: tuple) -> None:
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if event in _CHANGES or is_write:
            change()

    def count_sync(descriptor: int) -> None:
        change()
        sync(descriptor)

    os.fsync = count_sync
    sys.addaudithook(count)
