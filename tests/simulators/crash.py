"""Runs a function in a forked child that is killed at its n-th step on the way to the disk."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of the child: what it told before it ended, and what it had synced, size by inode."""

    crashed: bool
    told: tuple[str, ...]
    synced: dict[int, int]


def crash_points() -> Iterator[int]:
    return count()


def run_until_crash(function: Callable[[Callable[[str], None]], object], *, crash_at: int | None) -> Outcome:
    """Run `function(tell)` in a child; SIGKILL before, amid or after the writes, syncs and renames it makes.

    Raises:
        AssertionError: The child ended by an error of its own.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(function, crash_at, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitpid(child, 0)[1]
    crashed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert crashed or os.WEXITSTATUS(status) == 0, "\n".join(lines)
    words = [line.split() for line in lines]
    return Outcome(
        crashed=crashed,
        told=tuple(word[1] for word in words if word[0] == "told"),
        synced={int(word[1]): int(word[2]) for word in words if word[0] == "synced"},
    )


def power_cut(path: Path, outcome: Outcome) -> None:
    """Take from the file at `path` what was never synced."""
    if path.exists():
        os.truncate(path, outcome.synced.get(path.stat().st_ino, 0))


def _run_child(function: Callable[[Callable[[str], None]], object], crash_at: int | None, writer: int) -> None:
    write, fsync, replace = os.write, os.fsync, os.replace
    steps = count()

    def say(text: str) -> None:
        write(writer, f"{text}\n".encode())

    def step() -> None:
        if next(steps) == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_in_halves(descriptor: int, data: bytes) -> int:
        step()
        done = write(descriptor, data[: len(data) // 2])
        step()
        return done + write(descriptor, data[len(data) // 2 :])

    def fsync_and_say(descriptor: int) -> None:
        step()
        fsync(descriptor)
        status = os.fstat(descriptor)
        say(f"synced {status.st_ino} {status.st_size}")
        step()

    def replace_between_steps(source: str, target: str) -> None:
        step()
        replace(source, target)
        step()

    os.write, os.fsync, os.replace = write_in_halves, fsync_and_say, replace_between_steps
    try:
        function(lambda word: say(f"told {word}"))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must see it
        say(traceback.format_exc())
        os._exit(1)
    os._exit(0)
