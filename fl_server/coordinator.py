"""The coordinator service: a list of named steps on one event loop, ended together.

superlink   Flower's SuperLink as a child, started again whenever it ends
nodes       enrolled devices become nodes of the SuperLink, revoked ones are none any more
messages    what the fleet says, onto the roster; retained state again after a reconnect
jobs        what operators ask for, one at a time
runs        training that operators ask for, one run at a time, whatever else is asked meanwhile
rollouts    versions that come in waves: grown by their rate, ended by what devices report
revoked     shut out of the broker, and of every server that reads the list of revoked certificates
metadata    what is signed, signed again before it expires, and published if the broker lacks it
enrolment   what devices ask for through the proxy: their first certificate, and the next
watchdog    tells systemd, where it started this service, that the loop turns
"""

import asyncio
import contextlib
import logging
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path

from fl_server.announcer import Announcer
from fl_server.authority import Authority
from fl_server.config import ServerSettings
from fl_server.console.http import answering
from fl_server.directory import Directory
from fl_server.enrolment_desk import EnrolmentDesk, build_server_context, load_federation
from fl_server.errors import RunError, ServerError
from fl_server.fleet.intake import Intake, Kept
from fl_server.fleet.lockout import Lockout
from fl_server.fleet.mqtt import Connected, Disconnected, FromDevice, Link, LinkError
from fl_server.fleet.roster import Roster
from fl_server.jobs import (
    Job,
    Jobs,
    JobState,
    PromoteRequest,
    ReleaseRequest,
    ReleasingRequest,
    RollbackRequest,
    RolloutRequest,
    SteerRequest,
    WithdrawRequest,
)
from fl_server.orders import Orders
from fl_server.release import PUBLISH_ERRORS, ReleaseResult, Releases
from fl_server.rollout.keys import load_key
from fl_server.rollout.records import RolloutRecords
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rollout_status import RolloutStatus
from fl_server.rollouts import Rollouts
from fl_server.spent import recover_spent
from fl_server.superlink import SuperLink, check_port_free
from fl_server.training_run import RunResult, Services, TrainingRun
from models.contract.encoding import build_json
from models.contract.errors import ContractError
from models.contract.identity import Identity
from models.contract.messages import Ack, Event, Status
from models.contract.service import READY, STOPPING, feed_watchdog, notify
from models.contract.settings import SettingsError
from models.contract.topics import Channel, build_device_topic

logger = logging.getLogger(__name__)

JOBS_INTERVAL_S = 0.3
METADATA_INTERVAL_S = 60.0  # a day is the shortest lifetime of what is signed
DATABASE_PAUSE_S = 5.0  # after an error of its disk, which a person must make good
ROLLOUTS_INTERVAL_S = 5.0  # telemetry is looked at so often, events at once
ACK_MAX_IDS = 200  # of 32 characters: 7 kB of the 16 that a message may have
NODES_INTERVAL_S = 5.0  # a device that was just enrolled should find itself registered when it comes


def run(settings: ServerSettings, directory: Directory) -> None:
    """Run until SIGTERM or SIGINT; its children end with it.

    Raises:
        SettingsError: A certificate that it needs cannot be used.
        ServerError: It cannot start, or a step failed for good.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise
    logging.getLogger("absl").setLevel(logging.ERROR)  # dp-accounting tells each RDP order that it leaves out
    path = directory.database_path
    with Roster(path) as roster, Jobs(path) as jobs, RolloutRecords(path) as records:
        identity = _load_identity(settings, directory)
        check_port_free(settings.superlink)
        recover_spent(roster, directory.runs_dir)
        asyncio.run(_serve(settings, directory, roster, jobs, records, identity))


def _load_identity(settings: ServerSettings, directory: Directory) -> Identity | None:
    identity = directory.describe_coordinator(settings.broker)
    try:
        if identity is not None:
            identity.build_context()
    except OSError as error:
        raise SettingsError(f"broker.tls: {error}") from error
    return identity


async def _serve(
    settings: ServerSettings,
    directory: Directory,
    roster: Roster,
    jobs: Jobs,
    records: RolloutRecords,
    identity: Identity | None,
) -> None:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None

    def end() -> None:
        notify(STOPPING)
        main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    broker = settings.broker
    async with Link(host=broker.host, port=broker.port, fleet=settings.fleet, identity=identity) as link:
        coordinator = Coordinator(settings, directory, roster, jobs, records, link)
        try:
            async with asyncio.TaskGroup() as steps:
                for name, step in coordinator.steps.items():
                    steps.create_task(step(), name=name)
        except* ServerError as errors:
            error = errors.exceptions[0]
            raise ServerError(str(error)) from error
        except* asyncio.CancelledError:
            logger.info("told to end")


class Coordinator:
    """The steps, and what they share."""

    def __init__(
        self,
        settings: ServerSettings,
        directory: Directory,
        roster: Roster,
        jobs: Jobs,
        records: RolloutRecords,
        link: Link,
    ) -> None:
        self._settings, self._roster, self._jobs, self._link = settings, roster, jobs, link
        self._superlink = SuperLink(settings.superlink, directory, roster)
        self._directory, authority = directory, Authority(directory.ca_dir)
        self._desk = EnrolmentDesk(roster, authority, partial(load_federation, settings, directory))
        self._lockout = Lockout(
            settings.broker,
            roster,
            authority,
            servers=directory.pid_paths,
            ca_path=settings.broker.ca_path or directory.ca_path,
        )
        self._releases = Releases(settings, directory, link.publish)
        self._rollouts = Rollouts(directory, records, roster, self._releases, time.time)
        orders = Orders(fleet=settings.fleet, key=load_key(directory.order_key_path))
        self._announcer = Announcer(
            link, orders, roster, settings.rounds, load_floors=ReleaseRepository(directory).build_floors
        )
        self._services = Services(
            settings=settings,
            directory=directory,
            roster=roster,
            releases=self._releases,
            announcer=self._announcer,
            superlink=self._superlink,
        )
        self._database_path = directory.database_path
        self._run: TrainingRun | None = None
        self._reconnected, self._reported = asyncio.Event(), asyncio.Event()

    @property
    def steps(self) -> dict[str, Callable[[], Coroutine[None, None, None]]]:
        return {
            "superlink": self._superlink.keep_running,
            "nodes": self._keep_registered,
            "messages": self._listen,
            "jobs": partial(self._work, trains=False),
            "runs": partial(self._work, trains=True),
            "rollouts": self._keep_rollouts,
            "revoked": self._lockout.keep_out,
            "metadata": self._keep_published,
            **({"enrolment": self._take_enrolments} if self._settings.proxy.used else {}),
            "watchdog": feed_watchdog,
        }

    async def _take_enrolments(self) -> None:
        port = self._settings.proxy.coordinator_port
        try:
            async with answering(port, build_server_context(self._directory), self._desk.decide):
                await asyncio.Event().wait()
        except OSError as error:
            raise ServerError(f"proxy.coordinator_port: cannot listen on 127.0.0.1:{port}: {error.strerror}") from error

    async def _keep_registered(self) -> None:
        is_first = True  # the SuperLink's database may be a new one
        while True:
            try:
                members = [device for device in self._roster.list_devices() if device.revoked_at is None]
                if is_first or any(device.node_id is None for device in members):
                    await self._superlink.register_devices()
                    if is_first:
                        notify(READY)  # the SuperLink answers, and the other steps have begun
                    is_first = False
                await self._superlink.unregister_revoked()
            except (RunError, sqlite3.Error) as error:
                logger.warning("%s", error)
            await asyncio.sleep(NODES_INTERVAL_S)

    async def _listen(self) -> None:
        with Intake(self._database_path) as intake:
            while True:
                messages = list[FromDevice]()
                for item in await self._link.receive():
                    match item:
                        case Connected():
                            logger.info("connected to the broker")
                            self._reconnected.set()
                        case Disconnected():
                            logger.warning("the broker is away")
                        case FromDevice():
                            messages.append(item)
                if not messages:
                    continue
                try:
                    kept = await intake.keep(messages)
                except sqlite3.Error as error:  # an event that was not acknowledged comes again
                    who = ", ".join(sorted({message.device_id for message in messages}))
                    logger.error("what %.200s says could not be kept: %s", who, error)  # noqa: TRY400
                else:
                    await self._act(kept)

    async def _act(self, kept: Sequence[Kept]) -> None:
        """Act on what is on disk, and acknowledge events, those of a device together."""
        told: dict[str, list[str]] = {}
        for item in kept:
            match item.document:
                case Status() as status:
                    if self._run and _may_come_now(item.before, status):
                        await self._run.wake_absent(only=item.device_id)
                    if self._run and item.before and item.before.online and not status.online:
                        self._run.note_offline(item.device_id)
                    elif self._run and status.online:
                        self._run.note_online(item.device_id)
                case Event() as event:
                    told.setdefault(item.device_id, []).append(event.id)
                    if item.is_new:
                        logger.info("%s: %s %s", item.device_id, event.kind, event.message)
                        self._reported.set()
                        if self._run:
                            await self._run.note(item.device_id, event)
        await asyncio.gather(*(self._acknowledge(device_id, ids) for device_id, ids in told.items()))

    async def _acknowledge(self, device_id: str, ids: Sequence[str]) -> None:
        topic = build_device_topic(self._settings.fleet, device_id, Channel.ACK)
        for first in range(0, len(ids), ACK_MAX_IDS):
            with contextlib.suppress(LinkError):  # the device sends them again
                await self._link.publish(topic, build_json(Ack(ids=tuple(ids[first : first + ACK_MAX_IDS]))))

    async def _work(self, *, trains: bool) -> None:
        while True:
            try:
                if job := self._jobs.find_next(trains=trains):
                    await self._finish(job)
                else:
                    await asyncio.sleep(JOBS_INTERVAL_S)
            except sqlite3.Error as error:  # a full disk, say: the job is resumed, as after a restart
                logger.error("jobs wait for their database: %s", error)  # noqa: TRY400
                await asyncio.sleep(DATABASE_PAUSE_S)

    async def _finish(self, job: Job) -> None:
        self._jobs.save_state(job.job, JobState.RUNNING)
        try:
            result = await self._do(job)
        except (ServerError, ContractError, OSError) as error:
            logger.warning("job %d failed: %s", job.job, error)
            self._jobs.save_state(job.job, JobState.FAILED, str(error))
        except Exception as error:  # it would be resumed after a restart, and end the coordinator again
            logger.exception("job %d failed", job.job)
            self._jobs.save_state(job.job, JobState.FAILED, f"{type(error).__name__}: {error}; see the log")
        else:
            self._jobs.save_state(job.job, JobState.DONE, build_json(result).decode())

    async def _do(self, job: Job) -> ReleaseResult | RolloutStatus | RunResult:
        def say(line: str) -> None:
            logger.info("job %d: %s", job.job, line)
            self._jobs.add_line(job.job, line)

        match job.request:
            case ReleaseRequest() | PromoteRequest() | WithdrawRequest() | RollbackRequest():
                return await self._release(job.request, say)
            case RolloutRequest() | SteerRequest():
                return await self._roll_out(job.request, say)
        self._run = TrainingRun(f"{int(job.created_at)}-{job.job}", job.request, self._services, say)
        try:
            return await self._run.execute()
        finally:
            self._run = None

    async def _release(self, request: ReleasingRequest, say: Callable[[str], None]) -> ReleaseResult:
        match request:
            case ReleaseRequest(version_dir=version_dir, split=split):
                version = await self._releases.release_folder(Path(version_dir), split)
                what = "the champion" if split is None else f"the challenger, {split}"
            case PromoteRequest(model=model, version=number):
                version, what = await self._releases.promote(model, number), "the champion"
            case WithdrawRequest(model=model, version=number):
                version, what = self._releases.withdraw(model, number), "no challenger any more"
            case RollbackRequest(model=model, version=number):
                version, what = await self._rollouts.roll_back(model, number), "the champion"
        say(f"{version.model} version {version.version} is {what}; {await self._tell_fleet()}")
        return ReleaseResult(model=version.model, version=version.version, digest=version.manifest_digest)

    async def _roll_out(self, request: RolloutRequest | SteerRequest, say: Callable[[str], None]) -> RolloutStatus:
        match request:
            case RolloutRequest(version_dir=version_dir, plan=plan):
                status = await self._rollouts.start(Path(version_dir), plan)
            case SteerRequest(model=model, version=version, action="approve", wave=wave):
                status = await self._rollouts.approve(model, version, wave)
            case SteerRequest(model=model, version=version, action="halt"):
                status = await self._rollouts.halt(model, version)
            case SteerRequest(model=model, version=version):
                status = await self._rollouts.resume(model, version)
        told = await self._tell_fleet()
        say(f"{status}\n{told}")
        return status

    async def _tell_fleet(self) -> str:
        return "the fleet is told" if await self._releases.publish() else "the fleet is told once the broker is back"

    async def _keep_rollouts(self) -> None:
        while True:
            try:
                await self._rollouts.advance()
            except PUBLISH_ERRORS as error:
                logger.error("rollouts wait %.0f s: %s", ROLLOUTS_INTERVAL_S, error)  # noqa: TRY400
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROLLOUTS_INTERVAL_S):
                    await self._reported.wait()
            self._reported.clear()

    async def _keep_published(self) -> None:
        lacks_all = False
        while True:
            is_new_broker = await self._await_connection(METADATA_INTERVAL_S)
            lacks_all = lacks_all or is_new_broker
            try:
                await self._releases.publish(again=lacks_all)
                lacks_all = False
            except PUBLISH_ERRORS as error:
                # A full disk or a key service that is away must end neither a run nor what the broker retains.
                logger.error("not published, tried again in %.0f s: %s", METADATA_INTERVAL_S, error)  # noqa: TRY400
            if is_new_broker:
                await self._announcer.repeat()
                if self._run:
                    await self._run.wake_absent()

    async def _await_connection(self, timeout_s: float) -> bool:
        """Return whether the broker came within `timeout_s`, perhaps without what it retained."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._reconnected.wait()
        except TimeoutError:
            return False
        self._reconnected.clear()
        return True


def _may_come_now(before: Status | None, status: Status) -> bool:
    """Return whether waking may help now: a device repeats its status with every event, a refusal's too."""
    return status.online and (before is None or not before.online or before.version != status.version)
