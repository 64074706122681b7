"""Leads a staged version to its verdict: sandbox, shadow, service.

A try is taken on disk before the sandbox and before the service. The shadow is another process, which cannot end this
one, and may last for days: power cuts in it are not held against the version.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from edge_agent.errors import AgentError, StalledError, TransientError
from edge_agent.updates.download import OnEvent
from edge_agent.updates.machine import Activated, Failed, Healthy
from edge_agent.updates.probation import Probation, WithdrawnError
from edge_agent.updates.slots import TRIES, Slots, Version
from edge_agent.updates.standing import Standing
from models.contract.messages import EventKind
from models.contract.terms import ProbationRules

Job: TypeAlias = Callable[[], Awaitable[None]]


class Trials:
    """The trial of whatever the idle slot holds; used on one event loop."""

    def __init__(
        self,
        slots: Slots,
        probation: Probation,
        standing: Standing,
        *,
        on_event: OnEvent,
        on_settled: Callable[[], None],
        resume: Callable[[Job], None],
    ) -> None:
        """Try nothing yet.

        Args:
            slots: Where versions lie.
            probation: What tries them.
            standing: Is told of each step.
            on_event: Is told what happened.
            on_settled: Called with a verdict.
            resume: Has a job done, as the one that called `conclude`: what comes after the shadow.
        """
        self._slots, self._probation, self._standing = slots, probation, standing
        self._on_event, self._on_settled, self._resume = on_event, on_settled, resume
        self._rehearsing: asyncio.Task[None] | None = None
        self._wanted: str | None = None
        self._has_offer = False  # before the first offer whatever is on trial is wanted

    @property
    def is_in_shadow(self) -> bool:
        """Whether a version answers in the shadow now."""
        return self._rehearsing is not None and not self._rehearsing.done()

    async def conclude(self) -> None:
        """Lead the staged version to its verdict, or into the shadow."""
        trial = self._slots.get_trial()
        if trial.tries_left < 1:
            self._standing.advance(Activated(trial.digest))
            number = await asyncio.to_thread(self._slots.find_trial_version)
            await self._roll_back(trial.digest, f"it ended the agent {TRIES} times", number)
            return
        version = await self._begin_try()
        self._standing.advance(Activated(trial.digest))
        if not await self._passes(version, self._check(version, trial.rules)):
            return
        if trial.rules.seconds and self._slots.active is not None:
            with contextlib.suppress(OSError):  # the disk is full: it has one try fewer
                await asyncio.to_thread(self._slots.give_back_try)
            self._on_event(
                EventKind.UPDATING, f"{trial.rules.seconds} s on probation, in the shadow", version.manifest.version
            )
            self._rehearsing = asyncio.create_task(self._rehearse(version, trial.rules))
            self._rehearsing.add_done_callback(partial(self._end_rehearsal, version))
            return
        await self._take_over(version)

    async def let_go(self, wanted: str | None) -> None:
        """Bring no other version than `wanted` further: a rehearsal ends now, any other step is the last one."""
        self._has_offer, self._wanted = True, wanted
        trial, rehearsing = self._slots.trial, self._rehearsing
        if rehearsing is not None and self.is_in_shadow and trial is not None and trial.digest != wanted:
            self._probation.withdraw()
            await asyncio.wait({rehearsing})

    async def close(self) -> None:
        """End a rehearsal; the next start begins it again, with as many tries."""
        if self._rehearsing is not None and self.is_in_shadow:
            self._rehearsing.cancel()
            await asyncio.wait({self._rehearsing})

    async def _begin_try(self) -> Version:
        """Take a try on disk and return the version; one whose slot does not verify is dropped."""
        try:
            return await asyncio.to_thread(self._slots.begin_try)
        except StalledError as error:
            await asyncio.to_thread(self._slots.drop_trial)
            self._standing.reload()
            raise TransientError(str(error)) from error

    def _demand(self, version: Version) -> None:
        """Raise WithdrawnError if the fleet offers something else by now."""
        if self._has_offer and version.digest != self._wanted:
            raise WithdrawnError

    async def _check(self, version: Version, rules: ProbationRules) -> None:
        await self._probation.check(version, rules)
        self._demand(version)

    async def _rehearse(self, version: Version, rules: ProbationRules) -> None:
        self._demand(version)
        await self._probation.rehearse(version, rules)

    async def _prove(self, version: Version) -> None:
        self._demand(version)
        await self._probation.prove(version)

    def _end_rehearsal(self, version: Version, rehearsing: asyncio.Task[None]) -> None:
        if not rehearsing.cancelled():
            self._resume(partial(self._take_over_after, version, rehearsing))

    async def _take_over_after(self, version: Version, rehearsing: asyncio.Task[None]) -> None:
        if await self._passes(version, rehearsing):
            await self._begin_try()
            await self._take_over(version)

    async def _take_over(self, version: Version) -> None:
        """Answer with `version` from now on, if it can."""
        if not await self._passes(version, self._prove(version)):
            return
        try:
            await asyncio.to_thread(self._slots.commit)
        except (AgentError, OSError):
            await self._probation.change_back()
            raise
        self._standing.advance(Healthy(version.digest))
        self._on_settled()
        number = version.manifest.version
        self._on_event(EventKind.UPDATED, f"version {number} serves from slot {version.slot}", number)

    async def _passes(self, version: Version, step: Awaitable[None]) -> bool:
        """Return whether `version` has done `step`; what has not is rolled back."""
        try:
            await step
        except WithdrawnError:
            await self._drop(version)
        except TransientError:  # says nothing of the version
            await asyncio.to_thread(self._slots.drop_trial)
            self._standing.reload()
            raise
        except Exception as error:  # noqa: BLE001 - whatever an unhealthy version raises
            await self._roll_back(version.digest, str(error) or type(error).__name__, version.manifest.version)
        else:
            return True
        return False

    async def _drop(self, version: Version) -> None:
        await asyncio.to_thread(self._slots.drop_trial)
        self._standing.reload()
        if (active := self._slots.active) is not None:
            serving = active.manifest.version
            said = f"version {serving} serves on: version {version.manifest.version} is offered no more"
            self._on_event(EventKind.UPDATED, said, serving)

    async def _roll_back(self, digest: str, reason: str, number: int | None) -> None:
        await asyncio.to_thread(self._slots.roll_back)
        self._standing.advance(Failed(digest))
        self._on_settled()
        active = self._slots.active
        serving = "nothing is served" if active is None else f"version {active.manifest.version} serves on"
        self._on_event(EventKind.FAILED, f"rolled back and never tried again: {reason}; {serving}", number)
