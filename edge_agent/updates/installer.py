"""From an offer to the active slot: verify, fetch, stage, try, keep or roll back.

Whatever goes wrong, the version in the active slot keeps serving and one event says why. What may
go better next time is tried again, after a delay that doubles; what failed its trial never is.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from edge_agent.errors import AgentError, StalledError, TransientError, UnfitError
from edge_agent.updates.blobs import BlobStore, RetainedReader
from edge_agent.updates.challenger import ChallengerUpdater, ServeChallenger
from edge_agent.updates.challenger_slot import ChallengerSlot
from edge_agent.updates.download import Downloader, OnEvent, list_needed
from edge_agent.updates.following import Release, choose_release, find_release
from edge_agent.updates.machine import (
    Action,
    Activated,
    Event,
    Failed,
    Fetched,
    Healthy,
    Offered,
    Phase,
    UpdateState,
    advance,
)
from edge_agent.updates.order_key import update_order_key
from edge_agent.updates.probation import Probation, TryVersion
from edge_agent.updates.retry import Retry
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.slots import TRIES, Slots, Version
from edge_agent.updates.targets import SignedTargets
from models.contract.errors import ContractError
from models.contract.manifest import parse_manifest
from models.contract.messages import EventKind

logger = logging.getLogger(__name__)

OpenOffer: TypeAlias = Callable[[bytes], SignedTargets]
_REFUSALS_MAX = 64  # remembered; then some are told again
_Job: TypeAlias = Callable[[], Awaitable[None]]


class Updater:
    """Keeps a device on the release of its fleet that is for it; used on one event loop."""

    def __init__(
        self,
        settings: UpdaterSettings,
        *,
        open_offer: OpenOffer,
        reader: RetainedReader,
        try_version: TryVersion,
        serve_challenger: ServeChallenger | None,
        on_event: OnEvent,
    ) -> None:
        """Verify what the disk holds.

        Args:
            settings: What this updater is told.
            open_offer: Verifies an offer and trusts it from then on; raises StalledError. Called on a worker thread.
            reader: Reads retained messages.
            try_version: Loads the version in a directory, warms it up and answers with it from then on; raises if
                it is not healthy, and then nothing has changed. Called on a worker thread, also to change back.
            serve_challenger: Sets the release's challenger beside the champion, or none; None if the owner has one.
            on_event: Called on the loop with what happened, one line for a person, and the version it is about.
        """
        self._settings, self._open_offer, self._on_event = settings, open_offer, on_event
        downloads_dir = settings.state_dir / "downloads"
        self._blobs, self._keys, challenger_blobs = (
            BlobStore(downloads_dir / name, reader=reader, fleet=settings.fleet, window=settings.window)
            for name in ("versions", "keys", "challenger")
        )
        self._slots = Slots(settings.state_dir / "slots")
        self._probation = Probation(
            try_version=try_version, get_active=self.current, timeout_s=settings.trial_timeout_s
        )
        self._downloader = Downloader(settings, blobs=self._blobs, slots=self._slots, on_event=self._report)
        self._challenger = ChallengerUpdater(
            ChallengerSlot(settings.state_dir / "slots"),
            settings,
            champions=self._slots,
            blobs=challenger_blobs,
            serve=serve_challenger,
            on_event=self._report,
        )
        self._state = self._load_state()
        self._considering = asyncio.Lock()
        self._refusals: set[str] = set()  # told already: an offer comes again and again
        self._payload = b""  # the newest offer that was not refused: what a retry starts from
        self._deferred: tuple[str, _Job] | None = None  # digest, and what waits for the trial under way
        self._task: asyncio.Task[None] | None = None
        self._retry = Retry(self._try_again, delay_s=settings.retry_delay_s)

    def current(self) -> Version | None:
        """Return the version to serve, None before the first update."""
        return self._slots.active

    @property
    def phase(self) -> Phase:
        return self._state.phase

    @property
    def coordinator_key_path(self) -> Path:
        """The verified key that signs orders to devices, once an offer brought it."""
        return self._settings.state_dir / "coordinator.pem"

    async def start(self) -> None:
        """Report damage and end a trial that a crash left; call it once, when `current()` is served."""
        active = self._slots.active
        serving = "nothing is served" if active is None else f"version {active.manifest.version} serves"
        for damage in self._slots.damage:
            self._report(EventKind.FAILED, f"{damage}; {serving}")
        if self._slots.trial is not None:
            await self._end_trial()
        await self._challenger.resume()

    async def handle_offer(self, payload: bytes) -> None:
        """Bring the device to what `payload` offers; returns when that has ended, well or not.

        May be called while an earlier call is under way: a newer offer takes over a fetch, and waits for a trial.
        """
        self._retry.cancel()
        async with self._considering:
            targets = await self._open(payload)
            job = None if targets is None else await self._consider(targets)
            if job is not None:
                self._task = asyncio.create_task(self._drain(job))
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task})
        if targets is not None:
            await self._challenger.follow(targets)

    async def close(self) -> None:
        """End what is under way; the next start goes on from what is on disk."""
        self._retry.cancel()
        await self._challenger.close()
        await self._cancel_task()

    async def _open(self, payload: bytes) -> SignedTargets | None:
        """Return what a genuine offer signs."""
        try:
            targets = await asyncio.to_thread(self._open_offer, payload)
        except (AgentError, OSError) as error:
            self._report(EventKind.FAILED, str(error))
            if isinstance(error, TransientError):
                self._payload = payload
                self._retry.later()
            return None
        self._payload = payload
        return targets

    async def _consider(self, targets: SignedTargets) -> _Job | None:
        """Return what the offer gives to do now."""
        await self._update_key(targets)
        self._deferred = None
        release = self._choose(targets)
        action = self._advance(Offered(None if release is None else release.entry.digest))
        if action in (Action.FETCH, Action.ABANDON):
            await self._cancel_task()
        job = None if release is None else partial(self._install, targets, release)
        if action is Action.DEFER and release is not None and job is not None:
            self._deferred = (release.entry.digest, job)
        if self._slots.trial is not None and (self._task is None or self._task.done()):
            return self._conclude  # its verdict could not be written the last time
        return job if action is Action.FETCH else None

    def _choose(self, targets: SignedTargets) -> Release | None:
        """Return the release to follow, None to stay with what runs."""
        settings, active = self._settings, self._slots.active
        try:
            return choose_release(
                partial(find_release, targets, settings.model),
                device_id=settings.device_id,
                traits=settings.traits,
                active=None if active is None else active.digest,
            )
        except (AgentError, ContractError) as error:
            self._refuse(str(error), error.version if isinstance(error, UnfitError) else None)
            return None

    def _refuse(self, reason: str, version: int | None) -> None:
        """Say once why a release is not followed."""
        if reason not in self._refusals:
            self._refusals = {*self._refusals, reason} if len(self._refusals) < _REFUSALS_MAX else {reason}
            self._report(EventKind.FAILED, reason, version)

    async def _update_key(self, targets: SignedTargets) -> None:
        path, deadline_s = self.coordinator_key_path, self._settings.deadline_s
        try:
            await update_order_key(path, targets, blobs=self._keys, deadline_s=deadline_s)
        except (AgentError, OSError) as error:
            self._report(EventKind.FAILED, f"coordinator key: {error}")
            self._retry.later()

    async def _end_trial(self) -> None:
        self._task = asyncio.create_task(self._drain(self._conclude))
        await asyncio.wait({self._task})

    async def _drain(self, job: _Job) -> None:
        """Do `job`, then what was deferred meanwhile."""
        await self._attempt(job)
        while self._deferred is not None and self._slots.trial is None:
            digest, job = self._deferred
            self._deferred = None
            if self._advance(Offered(digest)) is Action.FETCH:
                await self._attempt(job)

    async def _attempt(self, job: _Job) -> None:
        try:
            await job()
        except TimeoutError:
            self._give_up(f"the fetch was not complete within {self._settings.deadline_s:.0f} s", retry=True)
        except (TransientError, OSError) as error:
            self._give_up(str(error), retry=True)
        except UnfitError as error:
            self._refuse(str(error), error.version)
            self._end_step()
        except (AgentError, ContractError) as error:
            self._give_up(str(error), retry=False)

    def _give_up(self, reason: str, *, retry: bool) -> None:
        self._report(EventKind.FAILED, reason)
        self._end_step()
        if retry:
            self._retry.later()

    def _end_step(self) -> None:
        if self._slots.trial is not None:  # its verdict could not be written: the disk says where we are
            self._state = self._load_state()
        elif self._state.target is not None:
            self._advance(Failed(self._state.target))

    async def _install(self, targets: SignedTargets, release: Release) -> None:
        if self._probation.is_hanging:
            raise TransientError("a version that hangs still holds the runtime")
        async with asyncio.timeout(self._settings.deadline_s):
            data = await self._downloader.fetch(release.entry, targets.find_target)
        self._advance(Fetched(release.entry.digest))
        manifest = parse_manifest(data)
        self._report(EventKind.UPDATING, "staging and trying", manifest.version)
        needed = list_needed(manifest, trains=self._settings.trains)
        await asyncio.to_thread(self._slots.stage, data, needed, self._blobs.read)
        await self._conclude()

    async def _conclude(self) -> None:
        """Lead the staged version to its verdict."""
        digest = self._slots.get_trial().digest
        if self._slots.get_trial().tries_left < 1:
            self._advance(Activated(digest))
            await self._roll_back(digest, f"it ended the agent {TRIES} times", None)
            return
        try:
            version = await asyncio.to_thread(self._slots.begin_try)
        except StalledError as error:
            await asyncio.to_thread(self._slots.drop_trial)
            raise TransientError(str(error)) from error
        self._advance(Activated(digest))
        number = version.manifest.version
        try:
            await self._probation.prove(version)
        except TransientError:  # says nothing of the version
            await asyncio.to_thread(self._slots.drop_trial)
            self._state = self._load_state()
            raise
        except Exception as error:  # noqa: BLE001 - whatever an unhealthy version raises
            await self._roll_back(digest, str(error) or type(error).__name__, number)
            return
        try:
            await asyncio.to_thread(self._slots.commit)
        except (AgentError, OSError):
            await self._probation.change_back()
            raise
        self._advance(Healthy(digest))
        self._settle()
        self._report(EventKind.UPDATED, f"version {number} serves from slot {version.slot}", number)

    async def _roll_back(self, digest: str, reason: str, number: int | None) -> None:
        await asyncio.to_thread(self._slots.roll_back)
        self._advance(Failed(digest))
        self._settle()
        active = self._slots.active
        serving = "nothing is served" if active is None else f"version {active.manifest.version} serves on"
        self._report(EventKind.FAILED, f"rolled back and never tried again: {reason}; {serving}", number)

    def _settle(self) -> None:
        self._retry.settle()
        self._blobs.keep_only(())

    async def _try_again(self) -> None:
        if self._payload:
            await self.handle_offer(self._payload)
        elif self._slots.trial is not None:
            await self._end_trial()

    async def _cancel_task(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def _load_state(self) -> UpdateState:
        """Return where the disk says that we are; a version that lacks files this device needs is not yet there."""
        active, trial = self._slots.active, self._slots.trial
        is_whole = active is not None and all(
            (active.directory / name).exists() for name in list_needed(active.manifest, trains=self._settings.trains)
        )
        return UpdateState(
            phase=Phase.IDLE if trial is None else Phase.STAGED,
            active=active.digest if active is not None and is_whole else None,
            target=None if trial is None else trial.digest,
            rejected=self._slots.rejected,
        )

    def _advance(self, event: Event) -> Action:
        self._state, action = advance(self._state, event)
        return action

    def _report(self, kind: EventKind, message: str, version: int | None = None) -> None:
        logger.info("%s: %s", kind, message)
        self._on_event(kind, message, version)
