"""Rollouts of a running coordinator: operators start and steer them, what devices report lets them grow or ends them.

What is decided is on disk first, then the registry's aliases follow, then the fleet is told: a kill between two of
them is made good by `advance`. In between the version is offered to nobody new.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from fl_server.directory import Directory
from fl_server.fleet.roster import Roster
from fl_server.registry.registry import ModelVersion, Registry, RegistryError
from fl_server.release import Releases
from fl_server.rollout.plan import RolloutPlan
from fl_server.rollout.records import RolloutRecords
from fl_server.rollout.waves import (
    Phase,
    Rollout,
    RolloutError,
    approve,
    grow,
    halt,
    judge_failures,
    judge_latency,
    resume,
    roll_back,
)
from fl_server.rollout_status import RolloutStatus, build_status, count, list_words

logger = logging.getLogger(__name__)


class Rollouts:
    """All rollouts of a coordinator; used on one event loop."""

    def __init__(
        self,
        directory: Directory,
        records: RolloutRecords,
        roster: Roster,
        releases: Releases,
        get_now_s: Callable[[], float],
    ) -> None:
        self._directory, self._records, self._roster, self._releases = directory, records, roster, releases
        self._get_now_s = get_now_s

    async def start(self, version_dir: Path, plan: RolloutPlan) -> RolloutStatus:
        """Let the version in `version_dir` be the champion of a first wave; once more does nothing.

        Raises:
            ServerError: It cannot be released, it is the champion, there is none, or another rollout is under way.
        """
        async with self._releases.changing:
            version = await asyncio.to_thread(self._releases.register, version_dir)
            rollout = self._begin(version, plan)
            with Registry(self._directory.registry_dir) as registry:
                registry.set_registered_model_alias(rollout.model, "champion", rollout.version)
        return self._describe(rollout)

    async def approve(self, model: str, version: int, wave: int) -> RolloutStatus:
        """Let the next wave, number `wave` from 0, begin; raises RolloutError, as the following do."""
        return await self._change(model, version, lambda rollout: approve(rollout, wave))

    async def halt(self, model: str, version: int) -> RolloutStatus:
        """Let nobody begin any more."""
        return await self._change(model, version, lambda rollout: halt(rollout, "an operator said so"))

    async def resume(self, model: str, version: int) -> RolloutStatus:
        """Go on; what failed and what was measured so far counts no more."""

        def go_on(rollout: Rollout) -> Rollout:
            resumed = resume(rollout, since=self._roster.find_last_event())
            if resumed != rollout:
                self._roster.forget_telemetry(model, version)
            return resumed

        return await self._change(model, version, go_on)

    async def roll_back(self, model: str, version: int) -> ModelVersion:
        """Let the champion `version` be it no more, and return the one that is again.

        Ends a rollout of it, and then it is released no more; otherwise it becomes the previous one. A rollout under
        way of a version that is not the champion holds up every release: then that is ended, and nothing else.
        """
        rollout = self._records.find(model)
        is_stray = rollout is not None and rollout.is_under_way and rollout.version != self._find_champion(model)
        if rollout is not None and rollout.is_under_way and (is_stray or rollout.version == version):
            await self._end(rollout, "an operator said so")
        elif rollout is not None:
            await self._restore(rollout)  # before a restart it had ended, and no more
        with Registry(self._directory.registry_dir) as registry:
            champion = registry.get_model_version_by_alias(model, "champion")
            if is_stray or champion.version != version:  # done, before a restart
                return champion
            before = registry.get_model_version_by_alias(model, "previous")
        return await self._releases.promote(model, before.version)

    async def advance(self) -> None:
        """Do what time and devices' reports give to do, and tell the fleet if that changes what is offered."""
        has_changed = False
        for rollout in self._records.list_all():
            has_changed = await self._advance(rollout) or has_changed
        if has_changed:
            await self._releases.publish()

    async def _advance(self, rollout: Rollout) -> bool:
        champion = self._find_champion(rollout.model)
        if champion != rollout.version:
            if rollout.phase is Phase.DONE:  # another version has taken its place
                self._records.forget(rollout.model)
            return False
        if rollout.phase is Phase.ROLLED_BACK:
            await self._restore(rollout)
            return True
        if reason := self._judge(rollout):
            logger.error("%s has ended, the fleet goes back to version %d: %s", rollout, rollout.before, reason)
            await self._end(rollout, reason)
            return True
        grown = self._grow(rollout)
        if grown != rollout:
            self._records.save(grown)
            logger.info("%s is %s at %.4g %%", grown, grown.phase, grown.percentage)
        return grown != rollout

    def _begin(self, version: ModelVersion, plan: RolloutPlan) -> Rollout:
        """Return the rollout of `version`, which is on disk then."""
        known = self._records.find(version.model)
        if known is not None and known.is_under_way:
            if (known.version, known.plan) != (version.version, plan):
                raise RolloutError(known.obstacle)
            return known
        if known is not None:
            self._releases.restore(known)
        with Registry(self._directory.registry_dir) as registry:
            champion = registry.get_model_version_by_alias(version.model, "champion")
            if champion.version == version.version:
                if known is not None and (known.version, known.plan) == (version.version, plan):
                    return known  # done at once, before a restart
                raise RolloutError(f"{version.model} version {version.version} is the champion already")
            try:
                previous = registry.get_model_version_by_alias(version.model, "previous").version
            except RegistryError:
                previous = None
        rollout = Rollout(
            model=version.model,
            version=version.version,
            before=champion.version,
            previous=previous,
            key=secrets.token_hex(8),
            plan=plan,
            since=self._roster.find_last_event(),
            runtime=version.load_manifest().runtime,
        )
        rollout = self._grow(rollout)
        self._roster.forget_telemetry(rollout.model, rollout.version)  # of an earlier rollout of it
        self._releases.save_requirements(version, plan.requirements)
        self._records.save(rollout)
        return rollout

    async def _change(self, model: str, version: int, change: Callable[[Rollout], Rollout]) -> RolloutStatus:
        async with self._releases.changing:
            rollout = self._records.find(model)
            if rollout is None or rollout.version != version:
                raise RolloutError(f"{model} version {version} is not being rolled out")
            if (champion := self._find_champion(model)) != version:
                raise RolloutError(f"{rollout} cannot go on: version {champion} is the champion")
            rollout = self._grow(change(rollout))
            self._records.save(rollout)
            return self._describe(rollout)

    def _grow(self, rollout: Rollout) -> Rollout:
        members = [device.device_id for device in self._roster.list_devices() if device.revoked_at is None]
        succeeded = count(list_words(self._roster, rollout)).updated
        return grow(rollout, devices=members, succeeded=succeeded, now_s=self._get_now_s())

    def _judge(self, rollout: Rollout) -> str | None:
        """Return why the rollout must end, None if it need not."""
        failures = judge_failures(rollout.plan, count(list_words(self._roster, rollout)))
        rule = rollout.plan.latency
        if failures is not None or rule is None:
            return failures
        told: dict[int, list[float]] = {rollout.version: [], rollout.before: []}
        for device in self._roster.list_devices():
            telemetry = device.telemetry
            if telemetry is None or telemetry.latency_p50_ms is None or device.revoked_at is not None:
                continue
            if telemetry.model == rollout.model and telemetry.version in told:
                told[telemetry.version].append(telemetry.latency_p50_ms)
        return judge_latency(rule, told[rollout.version], told[rollout.before])

    async def _end(self, rollout: Rollout, reason: str) -> None:
        ended = roll_back(rollout, reason)
        self._records.save(ended)
        await self._restore(ended)

    async def _restore(self, ended: Rollout) -> None:
        """Let the aliases stand for what they stood for before the rollout."""
        async with self._releases.changing:
            if self._records.find(ended.model) == ended:
                self._releases.restore(ended)

    def _find_champion(self, model: str) -> int | None:
        with Registry(self._directory.registry_dir) as registry:
            try:
                return registry.get_model_version_by_alias(model, "champion").version
            except RegistryError:
                return None

    def _describe(self, rollout: Rollout) -> RolloutStatus:
        return build_status(rollout, list_words(self._roster, rollout))
