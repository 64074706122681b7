"""From an offer to a challenger beside the champion: verify, fetch, stage, try, serve, and drop again.

It follows the champion's way with less at stake: its slot is its own, so there is nothing to roll back to. What the
signed release names stands beside the champion with the split it says, and nothing else does; what failed its trial
is never tried again. An owner who has configured a challenger keeps that one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from edge_agent.errors import AgentError, StalledError, TransientError, UnfitError
from edge_agent.updates.blobs import BlobStore
from edge_agent.updates.challenger_slot import Challenger, ChallengerSlot, Held
from edge_agent.updates.download import Downloader, OnEvent, list_needed
from edge_agent.updates.following import Release, check_requirements, find_release
from edge_agent.updates.retry import Retry
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.slots import TRIES, Slots
from edge_agent.updates.targets import SignedTargets
from models.contract.errors import ContractError
from models.contract.manifest import parse_manifest
from models.contract.messages import EventKind
from models.contract.terms import Split

logger = logging.getLogger(__name__)

ServeChallenger: TypeAlias = Callable[[Challenger | None], None]


class ChallengerUpdater:
    """Keeps a device on its fleet's challenger, if there is one; used on one event loop."""

    def __init__(
        self,
        slot: ChallengerSlot,
        settings: UpdaterSettings,
        *,
        champions: Slots,
        blobs: BlobStore,
        serve: ServeChallenger | None,
        on_event: OnEvent,
    ) -> None:
        """Touch nothing yet.

        Args:
            slot: Where the challenger lies.
            settings: What all of the updater is told.
            champions: The slots beside it: a file that lies there is not fetched.
            blobs: For its downloads alone.
            serve: Loads a challenger and sets it beside the champion, or with None takes it away; raises if it is
                not healthy, and then nothing has changed. Called on a worker thread. None: the owner has one.
            on_event: Called on the loop with what happened.
        """
        self._slot, self._settings, self._champions = slot, settings, champions
        self._blobs, self._serve, self._on_event = blobs, serve, on_event
        self._downloader = Downloader(
            settings,
            blobs=blobs,
            slots=champions,
            on_event=lambda kind, message, version: logger.debug("challenger %s: %s: %s", version, kind, message),
        )
        self._busy = asyncio.Lock()
        self._release: SignedTargets | None = None  # the newest; an older one that waits is passed over
        self._served: Held | None = None
        self._told = ""  # why the release's challenger does not stand here, as it was last said
        self._retry = Retry(self._try_again, delay_s=settings.retry_delay_s)
        self._steady = Retry(self._give_back_tries, delay_s=settings.steady_s)

    async def resume(self) -> None:
        """Serve what the slot holds from before; call it once, when the champion answers."""
        for damage in self._slot.damage:
            self._refuse(damage)
        async with self._busy:
            if self._serve is not None and self._slot.held is not None and self._served is None:
                await self._attempt(self._try(self._serve))

    async def follow(self, release: SignedTargets) -> None:
        """Bring the slot to what `release` names; returns when that has ended, well or not."""
        self._retry.cancel()
        self._release = release
        async with self._busy:
            if self._release is release:
                await self._attempt(self._bring(release))

    async def close(self) -> None:
        """Try nothing again; the next start goes on from what is on disk."""
        self._retry.cancel()
        self._steady.cancel()
        await self._give_back_tries()  # an agent that ends in good order was not ended by a challenger

    async def _attempt(self, job: Awaitable[None]) -> None:
        try:
            await job
        except TimeoutError:
            self._refuse(f"the fetch was not complete within {self._settings.deadline_s:.0f} s")
            self._retry.later()
        except (TransientError, OSError) as error:
            self._refuse(str(error))
            self._retry.later()
        except UnfitError as error:
            self._refuse_once(str(error), error.version)
        except (AgentError, ContractError) as error:
            self._refuse(str(error))

    async def _bring(self, targets: SignedTargets) -> None:
        release, held = find_release(targets, self._settings.model, "challenger"), self._slot.held
        if held is not None and (release is None or held.digest != release.entry.digest):
            await self._drop(held)
        if release is None or self._champions.active is None:
            return
        split = release.terms.split
        if split is None:
            raise StalledError("the challenger is signed without a split")
        if self._serve is None:
            self._refuse_once("the owner's own, [serving] challenger, stays", release.terms.version)
        elif release.entry.digest not in self._slot.rejected | self._champions.rejected:
            if self._slot.held is None:
                await self._stage(release, targets, split)
            elif self._slot.held.split != split:
                await asyncio.to_thread(self._slot.set_split, split)
            if self._slot.held != self._served:
                await self._try(self._serve)

    async def _stage(self, release: Release, targets: SignedTargets, split: Split) -> None:
        check_requirements(release, self._settings.traits)
        async with asyncio.timeout(self._settings.deadline_s):
            data = await self._downloader.fetch(release.entry, targets.find_target)
        needed = list_needed(parse_manifest(data), trains=self._settings.trains)
        await asyncio.to_thread(self._slot.stage, data, needed, self._blobs.read, split)

    async def _try(self, serve: ServeChallenger) -> None:
        """Lead the version in the slot to its verdict."""
        held = self._slot.get_held()
        if held.tries_left == 0:
            await self._reject(serve, held.version, f"it ended the agent {TRIES} times")
            return
        try:
            challenger = await asyncio.to_thread(self._slot.begin_try)
        except StalledError as error:
            self._served = None
            await asyncio.to_thread(serve, None)
            await asyncio.to_thread(self._slot.drop)
            raise TransientError(str(error)) from error
        try:
            await asyncio.to_thread(serve, challenger)
        except TransientError:  # says nothing of the version
            await asyncio.to_thread(self._slot.give_back_tries)
            raise
        except Exception as error:  # noqa: BLE001 - whatever an unhealthy version raises
            await self._reject(serve, held.version, str(error) or type(error).__name__)
            return
        await asyncio.to_thread(self._slot.prove)
        self._served = self._slot.held
        self._settle()
        self._steady.settle()
        self._steady.later()
        self._on_event(EventKind.CHALLENGER_SET, f"it stands beside the champion, {held.split}", held.version)

    async def _give_back_tries(self) -> None:
        """Hold nothing against what serves; where something is under way, that decides."""
        if self._served is None or self._served != self._slot.held or self._busy.locked():
            return
        async with self._busy:
            with contextlib.suppress(OSError):  # the disk is full: it has fewer tries, and serves on
                await asyncio.to_thread(self._slot.give_back_tries)
                self._served = self._slot.held

    async def _reject(self, serve: ServeChallenger, version: int, reason: str) -> None:
        await asyncio.to_thread(serve, None)
        await asyncio.to_thread(self._slot.reject)
        self._settle()
        self._refuse(f"never tried again: {reason}", version)

    async def _drop(self, held: Held) -> None:
        if self._serve is not None:
            await asyncio.to_thread(self._serve, None)
        await asyncio.to_thread(self._slot.drop)
        self._settle()
        self._on_event(EventKind.CHALLENGER_ENDED, "the release names it no more", held.version)

    def _settle(self) -> None:
        if self._slot.held is None:
            self._served = None
        self._retry.settle()
        self._blobs.keep_only(())

    def _refuse_once(self, reason: str, version: int) -> None:
        told = f"{version}: {reason}"
        if told != self._told:
            self._told = told
            self._refuse(reason, version)

    def _refuse(self, reason: str, version: int | None = None) -> None:
        self._on_event(EventKind.CHALLENGER_REFUSED, reason, version)

    async def _try_again(self) -> None:
        await (self.resume() if self._release is None else self.follow(self._release))
