"""Does something again after a delay that doubles; used on one event loop."""

import asyncio
from collections.abc import Awaitable, Callable

RETRY_MAX_S = 600.0


class Retry:
    """At most one attempt that waits for its time."""

    def __init__(self, work: Callable[[], Awaitable[None]], *, delay_s: float) -> None:
        """Arm nothing; the first `work` comes `delay_s` after `later` was called."""
        self._work, self._first_delay_s, self._delay_s = work, delay_s, delay_s
        self._task: asyncio.Task[None] | None = None

    def later(self) -> None:
        """Do it again, instead of whatever waited."""
        self.cancel()
        self._task = asyncio.create_task(self._wait(self._delay_s))
        self._delay_s = min(2 * self._delay_s, RETRY_MAX_S)

    def cancel(self) -> None:
        """Do not do it again."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def settle(self) -> None:
        """Begin with the shortest delay: what was tried has worked, or never will."""
        self._delay_s = self._first_delay_s

    async def _wait(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._task = None  # what is under way is not cancelled by a newer attempt
        await self._work()
