"""One training run: from the plan, round by round, to its last release.

    champion -> plan -> run directory -> open notice, wake commands -> driver -+-> closed notice, result
                                                                      ^        |
                                              "continue" <- verdict <-+- round-+

The run directory and the registry hold all of its state: started again, it goes on where it was.
"""

import asyncio
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from fl_server.announcer import Announcer
from fl_server.children import running
from fl_server.claim import BASE_NAME, build_claim, check_unit, load_base
from fl_server.config import ServerSettings
from fl_server.directory import Directory
from fl_server.errors import RunError, ServerError
from fl_server.fleet.roster import Roster
from fl_server.jobs import TrainRequest
from fl_server.packaging.architecture import load_parameters
from fl_server.plan import build_spec
from fl_server.release import Releases
from fl_server.rounds import run as rounds
from fl_server.rounds.events import Abandoned, Done, Event, Joined, RoundCompleted, UpdateRefused, parse_event
from fl_server.rounds.spool import discard_updates
from fl_server.rounds.words import build_gone
from fl_server.spent import keep_spent, keep_spooled
from fl_server.superlink import SuperLink
from models.contract.encoding import build_json, parse_json
from models.contract.files import save_atomically
from models.contract.manifest import PARAMETERS_NAME, Lineage
from models.contract.messages import Event as DeviceEvent
from models.contract.messages import EventKind
from models.contract.privacy import PrivacyPlan, Unit
from models.tensors.layout import Vector

OUTCOME_NAME = "outcome.json"
DRIVER_RESTARTS = 5  # of one that was killed, without a completed round between; one that reports an error has ended
DRIVER_PAUSE_S = 1.0
REWAKE_S = 35.0  # beyond the pause of a device after it ended training for its owner's sake


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one round brought; kept beside its checkpoint.

    Attributes:
        epsilon: Spent from the run's start to the end of this round.
        version: None if the gate kept the champion.
        value: Of the metric, on the server's held-out data.
        bytes_pushed: Bytes that a device on the champion before it fetches.
    """

    round: int
    accepted: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float
    epsilon: Decimal
    version: int | None
    metric: str
    value: Decimal
    bytes_pushed: int
    promoted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run brought; the result of its job."""

    run: str
    model: str
    privacy: PrivacyPlan
    epsilon: Decimal
    rounds: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a run uses of the coordinator."""

    settings: ServerSettings
    directory: Directory
    roster: Roster
    releases: Releases
    announcer: Announcer
    superlink: SuperLink


class TrainingRun:
    """The run of one job; `execute` may be called anew after any interruption."""

    def __init__(self, run: str, request: TrainRequest, services: Services, say: Callable[[str], None]) -> None:
        self._run, self._request, self._services, self._say = run, request, services, say
        self._run_dir = services.directory.runs_dir / run
        self._spec: rounds.RunSpec | None = None
        self._absent: set[str] = set()
        self._woken_again: set[str] = set()  # in the round under way, since their training process ended
        self._started: dict[str, float] = {}  # when each device's newest training process joined, by its own clock, s
        self._losing: dict[str, asyncio.Task[None]] = {}  # whom the broker lost
        self._waking: dict[str, asyncio.Task[None]] = {}  # in the round under way, once they may have the time again
        self._driver: Process | None = None
        self._round = 1  # under way

    async def execute(self) -> RunResult:
        """Run to the end.

        Raises:
            ServerError: It cannot begin or go on; what it released stays.
        """
        spec = self._spec = await self._prepare()
        await self._services.announcer.announce(spec, is_open=True)
        try:
            await self._drive_to_end(spec)
        except ServerError:
            await asyncio.to_thread(discard_updates, self._run_dir)
            await self._services.announcer.announce(spec, is_open=False)
            raise
        finally:
            self._spec = self._driver = None  # what is noted from now on is of no concern
            for task in (*self._losing.values(), *self._waking.values()):
                task.cancel()
        await self._services.announcer.announce(spec, is_open=False)
        outcomes = tuple(self._load_outcome(number) for number in range(1, spec.training.rounds + 1))
        return RunResult(
            run=spec.run,
            model=spec.model,
            privacy=spec.privacy,
            epsilon=outcomes[-1].epsilon,
            rounds=outcomes,
        )

    async def wake_absent(self, *, only: str | None = None) -> None:
        """Wake again who is missing, or `only` one of them: it came back, or the broker did."""
        if self._spec is not None:
            await self._services.announcer.wake(self._spec, self._absent if only is None else self._absent & {only})

    async def note(self, device_id: str, event: DeviceEvent) -> None:
        """Tell who follows the run why a device does not take part; wake it again, at once if its process has ended."""
        if event.run != self._run or self._spec is None or device_id not in self._spec.devices:
            return
        if event.kind is EventKind.TRAINING_STARTED:
            self._started[device_id] = max(event.sent_at, self._started.get(device_id, 0))
            self._absent.discard(device_id)
        if event.kind in (EventKind.TRAINING_REFUSED, EventKind.ORDER_REFUSED):
            self._say(f"{device_id}: {event.message}")
        if event.kind not in (EventKind.TRAINING_REFUSED, EventKind.TRAINING_ENDED):
            return
        if event.sent_at < self._started.get(device_id, 0):
            return  # of a process before the one that trains now: it was long on its way
        self._tell_gone(device_id, event.round or self._round)
        self._absent.add(device_id)
        if device_id not in self._waking:
            self._waking[device_id] = asyncio.create_task(self._wake_later(device_id))
        if event.kind is EventKind.TRAINING_ENDED and device_id not in self._woken_again:
            self._woken_again.add(device_id)  # once a round: one that cannot live would be started for ever
            await self._services.announcer.wake(self._spec, {device_id})

    def note_offline(self, device_id: str) -> None:
        """Let the round under way wait for the others alone, unless the device is back in time."""
        self.note_online(device_id)
        if self._driver is None:
            return
        self._losing[device_id] = asyncio.create_task(self._lose(device_id, self._round))

    def note_online(self, device_id: str) -> None:
        """Wait for the device as for any other: a broker that restarts says of all that they are away."""
        if task := self._losing.pop(device_id, None):
            task.cancel()

    async def _lose(self, device_id: str, number: int) -> None:
        await asyncio.sleep(self._services.settings.rounds.offline_grace_s)
        self._tell_gone(device_id, number)

    async def _wake_later(self, device_id: str) -> None:
        await asyncio.sleep(REWAKE_S)
        await self.wake_absent(only=device_id)

    def _begin_wakes(self) -> None:
        self._woken_again.clear()
        self._waking = {device_id: task for device_id, task in self._waking.items() if not task.done()}

    def _tell_gone(self, device_id: str, number: int) -> None:
        if self._driver is not None and self._driver.stdin is not None:
            self._driver.stdin.write(build_gone(device_id, number))

    async def _prepare(self) -> rounds.RunSpec:
        """Return the run's specification, made on the first call."""
        await self._services.superlink.register_devices()
        if not (self._run_dir / rounds.SPEC_NAME).exists():
            await asyncio.to_thread(self._create, self._choose_devices())
        spec = rounds.load_spec(self._run_dir)
        self._say(
            f"run {spec.run}: {len(spec.devices)} devices, {spec.training.rounds} rounds of {spec.training.steps} "
            f"steps, noise multiplier {spec.privacy.noise_multiplier}"
        )
        return spec

    def _choose_devices(self) -> dict[str, int]:
        """Return the node ids of the devices that can train the model now; for cohorts that are drawn, or ever could."""
        is_drawn = self._request.unit is Unit.DEVICE
        devices = {
            device.device_id: device.node_id
            for device in self._services.roster.list_devices()
            if device.node_id and device.status and device.status.model == self._request.model
            if device.may_train or (is_drawn and device.revoked_at is None and device.status.trains)
        }
        if not devices:
            raise RunError(f"no device that trains {self._request.model} is online; see fl-server devices")
        return devices

    def _create(self, devices: dict[str, int]) -> None:
        champion, architecture = self._services.releases.load_champion(self._request.model)
        check_unit(self._run_dir.parent, champion.load_manifest(), self._request.unit)
        training = architecture.training
        spec = build_spec(
            self._run,
            self._request,
            champion=champion.load_manifest(),
            layout=training.shared,
            devices=devices,
            settings=self._services.settings,
            directory=self._services.directory,
        )
        parameters = load_parameters(champion.directory / PARAMETERS_NAME, training.layout)
        shared = training.shared.flatten({name: parameters[name] for name in training.shared.names})
        self._run_dir.mkdir(exist_ok=True)
        save_atomically(self._run_dir / BASE_NAME, champion.load_manifest_bytes())
        rounds.create_run(self._run_dir, spec, shared)

    async def _drive_to_end(self, spec: rounds.RunSpec) -> None:
        log_path = self._services.directory.logs_dir / f"{spec.run}.log"
        command = (sys.executable, "-m", "fl_server.rounds", str(self._run_dir))
        kills = 0
        while True:
            concluded, self._absent = self._concluded, set(spec.devices)
            async with running(f"driver of run {spec.run}", command, log_path=log_path, piped=True) as driver:
                self._driver = driver
                await self.wake_absent()
                is_done = await self._follow(spec, driver)
                self._driver = None
                code = await driver.wait()
            if is_done:
                return
            kills = 1 if self._concluded > concluded else kills + 1
            if code >= 0 or kills > DRIVER_RESTARTS:
                raise RunError(f"run {spec.run} ended: {_read_last_line(log_path)}; its log: {log_path}")
            await asyncio.sleep(DRIVER_PAUSE_S)

    async def _follow(self, spec: rounds.RunSpec, driver: Process) -> bool:
        """Act on the driver's events until it ends; return whether it said that the run is done."""
        assert driver.stdin is not None
        assert driver.stdout is not None
        async for line in driver.stdout:
            event = parse_event(line)
            if isinstance(event, Done):
                return True
            await self._act(spec, event)
            if isinstance(event, RoundCompleted) and event.round < spec.training.rounds:
                driver.stdin.write(b"continue\n")
        return False

    async def _act(self, spec: rounds.RunSpec, event: Event) -> None:
        match event:
            case Joined():
                self._absent = set(spec.devices) - set(event.devices)
                self._say(f"{len(event.devices)} of {len(spec.devices)} devices joined")
                await self.wake_absent()
            case RoundCompleted():
                self._round = event.round + 1
                keep_spent(self._services.roster, spec, event.round, event.accepted)
                # Of unit device all are woken alike: what travels must not tell who took part.
                seen = set(event.accepted) if spec.privacy.unit is Unit.SAMPLE else set()
                self._absent = set(spec.devices) - seen
                self._begin_wakes()
                await self.wake_absent()
                await self._conclude(spec, event)
            case UpdateRefused():
                keep_spent(self._services.roster, spec, event.round, (event.device,))
                self._say(f"round {event.round}: the update of {event.device} does not count: {event.reason}")
            case Abandoned():
                keep_spooled(self._services.roster, spec, self._run_dir, event.round)
                self._say(f"round {event.round} was abandoned: {event.reason}")
                self._absent = set(spec.devices)
                self._begin_wakes()
                await self.wake_absent()

    async def _conclude(self, spec: rounds.RunSpec, event: RoundCompleted) -> None:
        """Offer what the round brought, if it is better; a round that was concluded before is left alone."""
        if event.round > self._concluded:
            outcome = await self._consider(spec, event)
            path = self._get_outcome_path(event.round)
            await asyncio.to_thread(save_atomically, path, build_json(outcome))
            became = f"released as version {outcome.version}" if outcome.promoted else f"not released: {outcome.reason}"
            self._say(
                f"round {outcome.round}/{spec.training.rounds}: {len(outcome.accepted)} of {len(spec.devices)} devices, "
                f"{outcome.seconds:.1f} s, {outcome.metric} {outcome.value:.3f}, epsilon {outcome.epsilon:.2f}, {became}"
            )

    async def _consider(self, spec: rounds.RunSpec, event: RoundCompleted) -> Outcome:
        base = load_base(self._run_dir)
        earlier = [self._load_outcome(number).version for number in range(1, event.round)]
        parent = max((version for version in earlier if version is not None), default=base.version)
        statement = await asyncio.to_thread(build_claim, self._run_dir.parent, spec, event.round)
        verdict = await self._services.releases.consider(
            spec.model,
            await asyncio.to_thread(self._load_whole, spec, event.round),
            lineage=Lineage(parent_version=parent, run=spec.run, round=event.round),
            privacy=statement,
            scratch_dir=rounds.build_round_dir(self._run_dir, event.round) / "version",
        )
        return Outcome(
            round=event.round,
            accepted=event.accepted,
            missing=event.missing,
            seconds=round(event.seconds, 3),
            epsilon=statement.epsilon,
            version=verdict.version,
            metric=verdict.metric,
            value=verdict.value,
            bytes_pushed=verdict.bytes_pushed,
            promoted=verdict.version is not None,
            reason=verdict.reason,
        )

    def _load_whole(self, spec: rounds.RunSpec, number: int) -> dict[str, Vector]:
        """Return the parameters after round `number` by name; those that devices have their own of, as last released."""
        champion, architecture = self._services.releases.load_champion(spec.model)
        released = load_parameters(champion.directory / PARAMETERS_NAME, architecture.training.layout)
        return released | spec.layout.unflatten(rounds.load_parameters(self._run_dir, spec.layout, number))

    @property
    def _concluded(self) -> int:
        """The last round whose outcome is on disk; rounds are concluded in order."""
        number = 0
        while self._get_outcome_path(number + 1).exists():
            number += 1
        return number

    def _load_outcome(self, number: int) -> Outcome:
        return parse_json(self._get_outcome_path(number).read_bytes(), Outcome, max_bytes=rounds.SPEC_MAX_BYTES)

    def _get_outcome_path(self, number: int) -> Path:
        return rounds.build_round_dir(self._run_dir, number) / OUTCOME_NAME


def _read_last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "its driver said nothing"
