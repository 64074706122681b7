"""A child process that stays and answers messages, so that what it works with can crash or hang without its parent."""

import os
import select
import threading
import time
from typing import BinaryIO

from edge_agent.children import DeadlineError, describe_end, read_cpu_s, start_child
from edge_agent.errors import StalledError

_LENGTH_BYTES = 8
_PIPE_BYTES = 65_536
_BUSY_SHARE = 0.1  # of a processor; a child that got less has not shown that it never ends


class Partner:
    """A child that answers one message after the other; asked by one thread, closed by any.

    A message is its length, 8 bytes, and as many bytes; `read_message` and `build_message` are the child's side.
    """

    def __init__(self, module: str, *arguments: str, deadline_s: float) -> None:
        """Begin `python -m module`.

        Args:
            module: What is run, with `arguments`.
            arguments: On its command line.
            deadline_s: For one answer. A child that had no processor for a tenth of it has longer, up to four times.

        Raises:
            TransientError: This machine cannot start a process now.
        """
        self._deadline_s, self._asking = deadline_s, threading.Lock()
        self._child = start_child(module, arguments)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._to, self._from = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def ask(self, message: bytes, *, answer_max_bytes: int) -> bytes:
        """Return the answer to `message`; blocks.

        Raises:
            StalledError: The child has ended, or says more than `answer_max_bytes`; the partner is of no more use.
            DeadlineError: There is no answer in time; the partner is of no more use.
        """
        with self._asking:
            if self._child.returncode is not None:
                raise StalledError("the process has ended")
            patience = _Patience(self._child.pid, self._deadline_s)
            try:
                self._write(build_message(message), patience)
                size_bytes = int.from_bytes(self._read(_LENGTH_BYTES, patience), "little")
                if size_bytes > answer_max_bytes:
                    raise StalledError(f"it answers {size_bytes} bytes, at most {answer_max_bytes} are read")
                return self._read(size_bytes, patience)
            except (BrokenPipeError, EOFError):
                raise StalledError(describe_end(self._child.wait())) from None

    def close(self) -> None:
        """End it; who asks meanwhile gets StalledError."""
        self._child.kill()
        with self._asking, self._child:
            pass

    def _write(self, data: bytes, patience: "_Patience") -> None:
        view = memoryview(data)
        while view:
            patience.wait(self._to, select.POLLOUT)
            view = view[os.write(self._to, view[:_PIPE_BYTES]) :]

    def _read(self, size_bytes: int, patience: "_Patience") -> bytes:
        data = bytearray()
        while len(data) < size_bytes:
            patience.wait(self._from, select.POLLIN)
            part = os.read(self._from, min(size_bytes - len(data), _PIPE_BYTES))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


class _Patience:
    """How long a child is waited for, from now on."""

    def __init__(self, pid: int, deadline_s: float) -> None:
        self._pid, self._deadline_s = pid, deadline_s
        self._began_s, self._had_s = time.monotonic(), read_cpu_s(pid)
        self._ends_s = self._began_s + deadline_s

    def wait(self, file: int, event: int) -> None:
        """Return when `file` is ready for `event`, or never will be; raises DeadlineError."""
        poll = select.poll()
        poll.register(file, event)
        while not poll.poll(1000 * max(0.0, self._ends_s - time.monotonic())):
            cpu_s, waited_s = read_cpu_s(self._pid) - self._had_s, time.monotonic() - self._began_s
            if cpu_s >= _BUSY_SHARE * self._deadline_s or waited_s >= 4 * self._deadline_s:
                raise DeadlineError(f"not done within {waited_s:.0f} s", cpu_s=cpu_s)
            self._ends_s = time.monotonic() + self._deadline_s / 4


def build_message(data: bytes) -> bytes:
    """Return `data` as it goes through the pipe of a `Partner`."""
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def read_message(stream: BinaryIO) -> bytes | None:
    """Return the next message to this child, None when its parent is gone."""
    length = stream.read(_LENGTH_BYTES)
    return stream.read(int.from_bytes(length, "little")) if len(length) == _LENGTH_BYTES else None
