"""Whether a staged version proves itself, and the way back when it does not.

First in a sandbox, then, if its release asks for it, in the shadow of the champion for a while, and then by answering.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from edge_agent.errors import StalledError
from edge_agent.updates.slots import Version
from models.contract.manifest import ModelManifest
from models.contract.terms import ProbationRules

logger = logging.getLogger(__name__)


class Rehearsal(Protocol):
    """A version in the shadow of the champion."""

    def judge(self) -> str | None:
        """End it, and return why the version does not pass, None if it does; blocks."""
        ...

    def close(self) -> None:
        """End it, judged or not; blocks."""
        ...


CheckVersion: TypeAlias = Callable[[Path, ProbationRules], None]
OpenRehearsal: TypeAlias = Callable[[Path, ProbationRules, Callable[[], None]], Rehearsal]
TryVersion: TypeAlias = Callable[[Path, ModelManifest], None]


class WithdrawnError(Exception):
    """The version on probation is offered no more: nothing was found out about it."""


class Probation:
    """Tries versions on a worker thread, each within a deadline."""

    def __init__(
        self,
        *,
        check_version: CheckVersion,
        open_rehearsal: OpenRehearsal,
        try_version: TryVersion,
        get_active: Callable[[], Version | None],
        timeout_s: float,
        tells_why: bool,
    ) -> None:
        """Try nothing yet.

        Args:
            check_version: Tries the version in a directory where it can do no harm; raises if it is not healthy.
            open_rehearsal: Has the version in a directory answer in the shadow; calls what it is given, on any thread,
                when the verdict can only be bad.
            try_version: Answers with the version in a directory; raises if it is not healthy, and then nothing has
                changed.
            get_active: Returns what to change back to.
            timeout_s: For `try_version`.
            tells_why: Whether what live requests have shown may be said to others.
        """
        self._check_version, self._open_rehearsal, self._try_version = check_version, open_rehearsal, try_version
        self._get_active, self._timeout_s, self._tells_why = get_active, timeout_s, tells_why
        self._hanging: asyncio.Task[None] | None = None
        self._ended: asyncio.Event | None = None
        self._is_withdrawn = False

    @property
    def is_hanging(self) -> bool:
        """Whether a version that was given up still runs: a thread cannot be ended."""
        return self._hanging is not None and not self._hanging.done()

    async def check(self, version: Version, rules: ProbationRules) -> None:
        """Return once `version` has shown in the sandbox that it may come nearer; raises what speaks against it."""
        await asyncio.to_thread(self._check_version, version.directory, rules)

    async def rehearse(self, version: Version, rules: ProbationRules) -> None:
        """Return once `version` has answered in the shadow for its time.

        Raises:
            StalledError: It does not pass; what speaks against it is said only to the owner, unless he shares it.
            TransientError: This machine has no process or no time for it now.
            WithdrawnError: `withdraw` was called.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._ended, self._is_withdrawn = ended, False

        def end() -> None:
            loop.call_soon_threadsafe(ended.set)

        rehearsal = await asyncio.to_thread(self._open_rehearsal, version.directory, rules, end)
        try:
            try:
                async with asyncio.timeout(rules.seconds):
                    await ended.wait()
            except TimeoutError:
                pass
            if self._is_withdrawn:
                raise WithdrawnError
            reason = await asyncio.to_thread(rehearsal.judge)
        finally:
            self._ended = None
            await asyncio.shield(asyncio.to_thread(rehearsal.close))
        if reason is not None:
            logger.warning("version %d did not pass its probation: %s", version.manifest.version, reason)
            raise StalledError(f"it did not pass its probation{f': {reason}' if self._tells_why else ''}")

    def withdraw(self) -> None:
        """End the rehearsal under way without a verdict."""
        if self._ended is not None:
            self._is_withdrawn = True
            self._ended.set()

    async def prove(self, version: Version) -> None:
        """Return once `version` is what answers; raises whatever makes it unhealthy."""
        trial = asyncio.create_task(asyncio.to_thread(self._try_version, version.directory, version.manifest))
        done, _ = await asyncio.wait({trial}, timeout=self._timeout_s)
        if not done:
            self._hanging = asyncio.create_task(self._await_the_end(trial))
            raise StalledError(f"not healthy within {self._timeout_s:.0f} s")
        trial.result()

    async def change_back(self) -> None:
        """Answer with the active version again."""
        if (active := self._get_active()) is not None:
            await asyncio.to_thread(self._try_version, active.directory, active.manifest)

    async def _await_the_end(self, trial: asyncio.Task[None]) -> None:
        await asyncio.wait({trial})
        if trial.exception() is None:  # it answers after all, but it was too slow
            await self.change_back()
