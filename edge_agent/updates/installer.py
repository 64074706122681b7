"""From an offer to the active slot: verify, fetch, stage, try, keep or roll back.

Whatever goes wrong, the version in the active slot keeps serving and one event says why. What may
go better next time is tried again, after a delay that doubles; what failed its trial never is.
"""

import asyncio
import logging
from functools import partial
from pathlib import Path

from edge_agent.errors import AgentError, TransientError, UnfitError
from edge_agent.updates.blobs import BlobStore, RetainedReader
from edge_agent.updates.challenger import ChallengerUpdater, ServeChallenger
from edge_agent.updates.challenger_slot import ChallengerSlot
from edge_agent.updates.download import Downloader, OnEvent, list_needed
from edge_agent.updates.following import Release
from edge_agent.updates.machine import Action, Failed, Fetched, Offered, Phase
from edge_agent.updates.offers import OfferDesk, OpenOffer
from edge_agent.updates.probation import CheckVersion, OpenRehearsal, Probation, TryVersion
from edge_agent.updates.retry import Retry
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.slots import Slots, Version
from edge_agent.updates.standing import Standing
from edge_agent.updates.targets import SignedTargets
from edge_agent.updates.trials import Job, Trials
from models.contract.errors import ContractError
from models.contract.manifest import parse_manifest
from models.contract.messages import EventKind

logger = logging.getLogger(__name__)


class Updater:
    """Keeps a device on the release of its fleet that is for it; used on one event loop."""

    def __init__(
        self,
        settings: UpdaterSettings,
        *,
        open_offer: OpenOffer,
        reader: RetainedReader,
        check_version: CheckVersion,
        open_rehearsal: OpenRehearsal,
        try_version: TryVersion,
        serve_challenger: ServeChallenger | None,
        on_event: OnEvent,
    ) -> None:
        """Verify what the disk holds.

        Args:
            settings: What this updater is told.
            open_offer: Verifies an offer and trusts it from then on; raises StalledError. Called on a worker thread.
            reader: Reads retained messages.
            check_version: As `Probation`; on a worker thread.
            open_rehearsal: As `Probation`; on a worker thread.
            try_version: Loads the version in a directory, warms it up and answers with it from then on; raises if
                it is not healthy, and then nothing has changed. Called on a worker thread, also to change back.
            serve_challenger: Sets the release's challenger beside the champion, or none; None if the owner has one.
            on_event: Called on the loop with what happened, one line for a person, and the version it is about.
        """
        self._settings, self._on_event = settings, on_event
        downloads_dir = settings.state_dir / "downloads"
        self._blobs, keys, challenger_blobs = (
            BlobStore(downloads_dir / name, reader=reader, fleet=settings.fleet, window=settings.window)
            for name in ("versions", "keys", "challenger")
        )
        self._slots = Slots(settings.state_dir / "slots")
        self._probation = Probation(
            check_version=check_version,
            open_rehearsal=open_rehearsal,
            try_version=try_version,
            get_active=self.current,
            timeout_s=settings.trial_timeout_s,
            tells_why=settings.shares_quality,
        )
        self._standing = Standing(self._slots, trains=settings.trains)
        self._trials = Trials(
            self._slots,
            self._probation,
            self._standing,
            on_event=self._report,
            on_settled=self._settle,
            resume=self._resume,
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
        self._retry = Retry(self._try_again, delay_s=settings.retry_delay_s)
        self._offers = OfferDesk(
            settings, open_offer=open_offer, keys=keys, on_event=self._report, try_later=self._retry.later
        )
        self._considering = asyncio.Lock()
        self._deferred: tuple[str, Job] | None = None  # digest, and what waits for the trial under way
        self._task: asyncio.Task[None] | None = None

    def current(self) -> Version | None:
        """Return the version to serve, None before the first update."""
        return self._slots.active

    @property
    def phase(self) -> Phase:
        return self._standing.phase

    @property
    def coordinator_key_path(self) -> Path:
        """The verified key that signs orders to devices, once an offer brought it."""
        return self._settings.order_key_path

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
        """Bring the device to what `payload` offers; returns when that has ended, well or not, or is in the shadow.

        May be called while an earlier call is under way: a newer offer takes over a fetch, and waits for a trial.
        """
        self._retry.cancel()
        async with self._considering:
            targets = await self._offers.open(payload)
            job = None if targets is None else await self._consider(targets)
            if job is not None:
                self._resume(job)
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task})
        if targets is not None:
            await self._challenger.follow(targets)

    async def close(self) -> None:
        """End what is under way; the next start goes on from what is on disk."""
        self._retry.cancel()
        await self._challenger.close()
        await self._trials.close()
        await self._cancel_task()

    async def _consider(self, targets: SignedTargets) -> Job | None:
        """Return what the offer gives to do now."""
        await self._offers.update_key(targets)
        self._deferred, active = None, self._slots.active
        release = self._offers.choose(targets, None if active is None else active.digest)
        action = self._standing.advance(Offered(None if release is None else release.entry.digest))
        if action in (Action.FETCH, Action.ABANDON):
            await self._cancel_task()
        job = None if release is None else partial(self._install, targets, release)
        if action is Action.DEFER and release is not None and job is not None:
            self._deferred = (release.entry.digest, job)
        if release is not None and active is not None:
            self._explain_staying(release, active)
        await self._trials.let_go(None if release is None else release.entry.digest)
        is_idle = (self._task is None or self._task.done()) and not self._trials.is_in_shadow
        if self._slots.trial is not None and is_idle:
            return self._trials.conclude  # its verdict could not be written the last time
        return job if action is Action.FETCH else None

    def _explain_staying(self, release: Release, active: Version) -> None:
        """Say once that the fleet goes back to a version that this device cannot go back to."""
        number, serving = release.terms.version, active.manifest.version
        if release.entry.digest in self._slots.rejected and number < serving:
            reason = (
                f"version {number} failed its trial here once and is never tried again; version {serving} serves on"
            )
            self._offers.refuse(reason, number)

    async def _end_trial(self) -> None:
        self._task = asyncio.create_task(self._drain(self._trials.conclude))
        await asyncio.wait({self._task})

    def _resume(self, job: Job) -> None:
        self._task = asyncio.create_task(self._drain(job))

    async def _drain(self, job: Job) -> None:
        """Do `job`, then what was deferred meanwhile."""
        await self._attempt(job)
        while self._deferred is not None and self._slots.trial is None:
            digest, job = self._deferred
            self._deferred = None
            if self._standing.advance(Offered(digest)) is Action.FETCH:
                await self._attempt(job)

    async def _attempt(self, job: Job) -> None:
        try:
            await job()
        except TimeoutError:
            self._give_up(f"the fetch was not complete within {self._settings.deadline_s:.0f} s", retry=True)
        except (TransientError, OSError) as error:
            self._give_up(str(error), retry=True)
        except UnfitError as error:
            self._offers.refuse(str(error), error.version)
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
            self._standing.reload()
        elif self._standing.target is not None:
            self._standing.advance(Failed(self._standing.target))

    async def _install(self, targets: SignedTargets, release: Release) -> None:
        if self._probation.is_hanging:
            raise TransientError("a version that hangs still holds the runtime")
        async with asyncio.timeout(self._settings.deadline_s):
            data = await self._downloader.fetch(release.entry, targets.find_target)
        self._standing.advance(Fetched(release.entry.digest))
        manifest = parse_manifest(data)
        self._report(EventKind.UPDATING, "staging and trying", manifest.version)
        needed = list_needed(manifest, trains=self._settings.trains)
        rules = release.terms.probation
        await asyncio.to_thread(self._slots.stage, data, needed, self._blobs.read, rules)
        await self._trials.conclude()

    def _settle(self) -> None:
        self._retry.settle()
        self._blobs.keep_only(())

    async def _try_again(self) -> None:
        if self._offers.payload:
            await self.handle_offer(self._offers.payload)
        elif self._slots.trial is not None:
            await self._end_trial()

    async def _cancel_task(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def _report(self, kind: EventKind, message: str, version: int | None = None) -> None:
        logger.info("%s: %s", kind, message)
        self._on_event(kind, message, version)
