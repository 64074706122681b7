"""How far long work is: one changing line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

_TERMINAL_INTERVAL_S = 0.2
_PLAIN_INTERVAL_S = 10.0


class Progress:
    """Counts what is done and says so on `stream`."""

    def __init__(
        self, what: str, *, done: int = 0, stream: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin.

        Args:
            what: Plural of what is counted.
            done: How many there were before; they do not count for the rate.
            stream: Where to say it.
            clock: In s, from any beginning.
        """
        self.done = done
        self._what = what
        self._stream = stream
        self._clock = clock
        self._first = done
        self._started_s = self._shown_s = clock()

    def add(self, count: int) -> None:
        """Count `count` more, and show it if it is time."""
        self.done += count
        is_terminal = self._stream.isatty()
        if self._clock() - self._shown_s >= (_TERMINAL_INTERVAL_S if is_terminal else _PLAIN_INTERVAL_S):
            self._show("\r" if is_terminal else "", "" if is_terminal else "\n")

    def end(self) -> None:
        """Leave the last count on a line of its own, on a terminal."""
        if self._stream.isatty():
            self._show("\r", "\n")

    def _show(self, before: str, after: str) -> None:
        self._shown_s = self._clock()
        rate = (self.done - self._first) / max(self._shown_s - self._started_s, 1e-9)
        print(f"{before}{self.done} {self._what}, {rate:.0f}/s", end=after, file=self._stream, flush=True)
