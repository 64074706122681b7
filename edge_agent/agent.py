"""The control loop of a device: a list of steps that wires the parts.

Each step needs only those before it, and serving only the first two: broker, coordinator, training and
disk may fail, and the model still answers.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from edge_agent import __version__
from edge_agent.children import forbid_core_dumps
from edge_agent.collector import Collector
from edge_agent.config import AgentSettings
from edge_agent.errors import AgentError, RequestError, StalledError, TransientError
from edge_agent.http.app import App, Device
from edge_agent.http.guard import TOKEN_NAME, load_token
from edge_agent.http.samples import parse_samples
from edge_agent.http.server import bind_sockets
from edge_agent.inference.sandbox import Pace, try_in_sandbox
from edge_agent.link.mqtt import Broker, Link
from edge_agent.lock import holding_lock
from edge_agent.model_server import ModelServer
from edge_agent.monitor.telemetry import read_rss_mb
from edge_agent.owner import OwnerStatus, load_privacy_report
from edge_agent.renewal import keep_renewed
from edge_agent.reporter import Reporter
from edge_agent.samples.sensor import SensorFeed
from edge_agent.traits import find_traits
from edge_agent.updates.challenger_slot import Challenger
from edge_agent.updates.installer import Updater
from edge_agent.updates.probation import Rehearsal
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.told_floors import TOLD_NAME
from edge_agent.updates.verifier import verify_offer
from edge_agent.updates.watch import OfferWatch
from edge_agent.wake import TrainingDesk
from models.contract.encoding import parse_json
from models.contract.errors import ContractError, MalformedError
from models.contract.floors import FLOORS_NAME
from models.contract.manifest import ModelManifest
from models.contract.messages import MESSAGE_MAX_BYTES, Ack, EventKind
from models.contract.service import READY, STOPPING, feed_watchdog, notify
from models.contract.settings import SettingsError
from models.contract.terms import ProbationRules
from models.contract.topics import Channel, build_device_topic, build_offer_topic

log = logging.getLogger(__name__)

RETENTION_INTERVAL_S = 600.0  # between two looks for samples that are too old
TASKS_MAX = 8  # messages being worked on at once; the coordinator sends a few an hour


def run_agent(settings: AgentSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        SettingsError: Something the settings name cannot be had; nothing was started.
        AgentError: The agent cannot go on.
    """
    forbid_core_dumps()
    try:
        if settings.broker_identity is not None:
            settings.broker_identity.build_context()
    except OSError as error:
        raise SettingsError(f"[identity] {error}") from error
    try:
        root = settings.tuf_root_path.read_bytes()
        settings.state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}") from error
    with holding_lock(settings.state_dir):
        sockets = bind_sockets(settings.http.host, settings.http.port, settings.uds_path)
        try:
            agent = Agent(settings, root, sockets)
        except OSError as error:
            raise StalledError(f"{error.filename}: {error.strerror}") from error
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(agent.run())


class Agent:
    """One device; `run` is its life."""

    def __init__(self, settings: AgentSettings, root: bytes, sockets: Sequence[socket.socket]) -> None:
        self._settings = settings
        self._traits = find_traits(settings.region)
        self._sockets = sockets
        self._token = load_token(settings.state_dir / TOKEN_NAME)
        self._server = ModelServer(settings.model, load_again=self._load_again if settings.serving.repository else None)
        self._engine = self._server.engine
        self._samples = Collector(settings, get_manifest=self._find_manifest)
        self._sensor = SensorFeed(parse=parse_samples, keep=self._samples.add, keep_share=settings.samples.keep_share)
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._offer_topic = build_offer_topic(settings.fleet)
        self._command_topic = build_device_topic(settings.fleet, settings.device_id, Channel.COMMAND)
        self._ack_topic = build_device_topic(settings.fleet, settings.device_id, Channel.ACK)
        self._link = Link(
            self._describe_broker(),
            build_will=lambda: self._reporter.build_status(online=False),
            on_message=self._take_message,
            on_connected=lambda: self._reporter.greet(),  # noqa: PLW0108 - it is made below
        )
        self._updater = Updater(
            self._describe_updates(),
            open_offer=partial(
                verify_offer,
                root=root,
                trust_dir=settings.state_dir / "tuf",
                told=(settings.tuf_root_path.with_name(FLOORS_NAME), settings.state_dir / TOLD_NAME),
            ),
            reader=self._link,
            check_version=self._check_version,
            open_rehearsal=self._open_rehearsal,
            try_version=self._server.adopt,
            serve_challenger=None if settings.serving.challenger is not None else self._serve_challenger,
            on_event=lambda kind, message, version: self._reporter.tell(kind, message, version=version),
        )
        self._reporter = Reporter(settings, self._traits, link=self._link, updater=self._updater, server=self._server)
        self._offers = OfferWatch(self._updater.handle_offer)
        self._training = TrainingDesk(
            settings,
            updater=self._updater,
            reporter=self._reporter,
            load_samples_key=self._samples.keeper.load_key,
        )

    async def run(self) -> None:
        """Go through the steps, wait for a signal, and undo them in turn."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopped.set)
        steps = (
            ("outbox", self._keep_outbox),
            ("model", self._load_active),
            ("http", self._start_http),
            ("readiness", self._tell_ready),
            ("challenger", self._start_owners_challenger),
            ("retention", self._start_retention),
            ("sensor", self._start_sensor),
            ("link", self._start_link),
            ("renewal", self._start_renewal),
            ("updates", self._start_updates),
            ("training", self._prepare_training),
            ("telemetry", self._start_telemetry),
        )
        async with contextlib.AsyncExitStack() as stack:
            for name, step in steps:
                log.debug("step %s", name)
                await step(stack)
            log.info("%s serves on %s:%d", self._settings.device_id, self._settings.http.host, self._settings.http.port)
            await self._stopped.wait()
            notify(STOPPING)
            log.info("stopping")

    # Steps

    async def _keep_outbox(self, stack: contextlib.AsyncExitStack) -> None:
        stack.callback(self._reporter.close)
        stack.callback(self._samples.keeper.close)

    async def _load_active(self, _stack: contextlib.AsyncExitStack) -> None:
        version = self._updater.current()
        if version is None:
            return
        try:
            self._server.adopt(version.directory, version.manifest)
        except AgentError as error:
            self._reporter.tell(
                EventKind.FAILED, f"the active version does not load: {error}", version=version.manifest.version
            )

    async def _start_http(self, stack: contextlib.AsyncExitStack) -> None:
        app = App(self._describe_device(), host=self._settings.http.host, token=self._token)
        grpc = self._settings.grpc
        address = None if grpc is None else (grpc.host, grpc.port)
        answering = self._server.answer(app, self._sockets, on_end=self._stopped.set, grpc_address=address)
        await stack.enter_async_context(answering)

    async def _tell_ready(self, stack: contextlib.AsyncExitStack) -> None:
        _start_task(stack, feed_watchdog())
        notify(READY)

    async def _start_owners_challenger(self, stack: contextlib.AsyncExitStack) -> None:
        if self._settings.serving.challenger is not None:
            _start_task(stack, asyncio.to_thread(self._serve_owners, self._settings.serving.challenger))

    async def _start_sensor(self, stack: contextlib.AsyncExitStack) -> None:
        if self._settings.samples.mqtt_topic is not None:
            _start_task(stack, self._sensor.run())

    async def _start_retention(self, stack: contextlib.AsyncExitStack) -> None:
        _start_task(stack, self._forget_old())

    async def _start_link(self, stack: contextlib.AsyncExitStack) -> None:
        _start_task(stack, self._link.run())

    async def _start_renewal(self, stack: contextlib.AsyncExitStack) -> None:
        if self._settings.renewal is not None and self._settings.identity is not None:
            _start_task(stack, keep_renewed(self._settings.identity, self._settings.renewal.server))

    async def _start_updates(self, stack: contextlib.AsyncExitStack) -> None:
        stack.push_async_callback(self._updater.close)
        _start_task(stack, self._updater.start())
        _start_task(stack, self._offers.keep_checking())

    async def _prepare_training(self, stack: contextlib.AsyncExitStack) -> None:
        stack.push_async_callback(self._training.stop)

    async def _start_telemetry(self, stack: contextlib.AsyncExitStack) -> None:
        _start_task(stack, self._reporter.send_telemetry())

    # What the broker brings

    def _take_message(self, topic: str, payload: bytes) -> None:
        if topic == self._offer_topic:
            self._work(self._offers.take(payload))
        elif topic == self._command_topic:
            self._work(self._training.handle_command(payload))
        elif topic == self._ack_topic:
            self._take_ack(payload)
        elif topic == self._settings.samples.mqtt_topic:
            self._sensor.take(payload)
        else:
            self._reporter.ignored += 1

    def _take_ack(self, payload: bytes) -> None:
        try:
            self._reporter.take_ack(parse_json(payload, Ack, max_bytes=MESSAGE_MAX_BYTES))
        except MalformedError:
            self._reporter.ignored += 1

    # What the parts ask of each other

    def _check_version(self, directory: Path, rules: ProbationRules) -> None:
        current, ratio = self._updater.current(), rules.max_latency_ratio
        pace = None if current is None or ratio is None else Pace(beside=current.directory, max_ratio=float(ratio))
        try_in_sandbox(directory, pace=pace)

    def _open_rehearsal(self, directory: Path, rules: ProbationRules, on_failed: Callable[[], None]) -> Rehearsal:
        current = self._updater.current()
        if current is None:
            raise TransientError("no version serves that another one could be compared with")
        from edge_agent.inference.rehearsal import Rehearsal as InShadow  # memory that few releases ask for

        return InShadow(self._engine, directory, champion_dir=current.directory, rules=rules, on_failed=on_failed)

    def _load_again(self) -> None:
        current = self._updater.current()
        if current is None:
            raise RequestError("this device has no version yet: it waits for its first release", status=503)
        self._server.adopt(current.directory, current.manifest)

    def _serve_challenger(self, challenger: Challenger | None) -> None:
        if challenger is None:
            self._server.end_challenge()
            return
        if not challenger.is_proven:
            try_in_sandbox(challenger.directory)
        split = challenger.split
        self._server.challenge(challenger.directory, weight=float(split.weight), shadow=split.shadow)

    def _serve_owners(self, directory: Path) -> None:
        serving = self._settings.serving
        try:
            try_in_sandbox(directory)
            self._server.challenge(directory, weight=serving.weight, shadow=serving.shadow)
        except (AgentError, ContractError) as error:
            log.error("no challenger: %s", error)  # noqa: TRY400 - the message says it all

    async def _forget_old(self) -> None:
        while True:
            try:
                if forgotten := await asyncio.to_thread(self._samples.keeper.forget_old):
                    log.info("%d samples are older than the owner keeps them, and forgotten", forgotten)
            except AgentError as error:
                log.warning("old samples cannot be forgotten: %s", error)
            await asyncio.sleep(RETENTION_INTERVAL_S)

    def _find_manifest(self) -> ModelManifest | None:
        return self._engine.active.manifest if self._engine.active else None

    async def _build_owner_status(self) -> OwnerStatus:
        samples = await asyncio.to_thread(self._samples.keeper.count)  # waits for whoever uses them
        settings, current, model = self._settings, self._updater.current(), self._engine.active
        return OwnerStatus(
            device_id=settings.device_id,
            fleet=settings.fleet,
            agent=__version__,
            model=settings.model,
            version=model.manifest.version if model else None,
            slot=current.slot if current else None,
            ready=model is not None,
            update=self._updater.phase,
            connected=self._link.connected,
            training=self._training.run,
            samples=samples,
            unsent_events=self._reporter.count_unsent(),
            ignored_messages=self._reporter.ignored + self._sensor.ignored,
            dropped_messages=self._reporter.count_dropped(),
            uptime_s=round(self._reporter.uptime_s, 1),
            rss_mb=round(read_rss_mb(), 1),
        )

    def _describe_device(self) -> Device:
        return Device(
            agent_version=__version__,
            models=self._engine,
            add_samples=self._samples.add,
            build_inputs=self._samples.build_inputs,
            get_status=self._build_owner_status,
            get_privacy=lambda: load_privacy_report(self._settings),
            get_metrics=self._server.build_metrics,
            record_latency=self._server.latencies.record,
            record_failure=self._server.count_failure,
            remember=self._samples.remember,
            add_feedback=self._samples.add_feedback,
            forget=self._samples.forget,
        )

    def _describe_broker(self) -> Broker:
        settings = self._settings
        sensor = settings.samples.mqtt_topic
        return Broker(
            host=settings.broker.host,
            port=settings.broker.port,
            client_id=settings.device_id,
            keepalive_s=settings.broker.keepalive_s,
            subscriptions=tuple(filter(None, (self._offer_topic, self._command_topic, self._ack_topic, sensor))),
            identity=settings.broker_identity,
        )

    def _describe_updates(self) -> UpdaterSettings:
        settings = self._settings
        return UpdaterSettings(
            fleet=settings.fleet,
            model=settings.model,
            device_id=settings.device_id,
            traits=self._traits,
            state_dir=settings.state_dir,
            trains=settings.federation is not None,
            shares_quality=settings.telemetry.share_quality,
            deadline_s=settings.updates.deadline_s,
            window=settings.updates.window,
        )

    # Tasks

    def _work(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Do what a message asks for, beside what is under way."""
        if len(self._tasks) >= TASKS_MAX:
            coroutine.close()
            self._reporter.ignored += 1
            return
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end_work)

    def _end_work(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a message of the broker could not be handled", exc_info=task.exception())


def _start_task(stack: contextlib.AsyncExitStack, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run `coroutine` beside the steps until the stack is undone; its failure is logged and serving goes on."""
    task = asyncio.create_task(coroutine)
    task.add_done_callback(_log_failure)

    async def end() -> None:
        task.cancel()
        await asyncio.wait({task})

    stack.push_async_callback(end)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a part of the agent has failed", exc_info=task.exception())
