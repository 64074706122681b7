"""From a wake command to a training process, and from what that process says to events."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_agent.config import AgentSettings
from edge_agent.errors import StalledError
from edge_agent.gatekeeper import Gatekeeper
from edge_agent.reporter import Reporter
from edge_agent.training.job import TrainingJob, build_job, parse_event
from edge_agent.training.supervisor import Bounds, Supervisor
from edge_agent.updates.installer import Updater
from edge_agent.updates.told_floors import TOLD_NAME, keep_told
from models.contract.errors import EnvelopeError, MalformedError
from models.contract.messages import EventKind

if TYPE_CHECKING:
    from models.contract.envelope import WakeCommand

log = logging.getLogger(__name__)

TRAINER_COMMAND = (sys.executable, "-m", "edge_agent.trainer")
_EVENTS = {
    "joined": EventKind.TRAINING_STARTED,
    "trained": EventKind.PRIVACY_SPENT,
    "refused": EventKind.TRAINING_REFUSED,
    "order_refused": EventKind.ORDER_REFUSED,
    "ended": EventKind.TRAINING_ENDED,
}


class TrainingDesk:
    """Decides on commands one after the other and keeps at most one training process."""

    def __init__(
        self,
        settings: AgentSettings,
        *,
        updater: Updater,
        reporter: Reporter,
        gatekeeper: Gatekeeper,
        load_samples_key: Callable[[], bytes],
    ) -> None:
        self._settings = settings
        self._updater = updater
        self._reporter = reporter
        self._gatekeeper = gatekeeper
        self._load_samples_key = load_samples_key
        self._lock = asyncio.Lock()
        bounds = Bounds(
            niceness=settings.training.niceness,
            memory_bytes=settings.training.max_memory_mb * 1_000_000,
            cpu_s=settings.training.max_cpu_s,
        )
        self._supervisor = Supervisor(TRAINER_COMMAND, bounds=bounds, on_line=self._take_line, on_exit=self._note_exit)

    @property
    def run(self) -> str | None:
        """The run that has a training process now."""
        return self._supervisor.run

    async def handle_command(self, payload: bytes) -> None:
        """Act on a command of the coordinator, or say why not; what is no command at all is ignored."""
        async with self._lock:
            try:
                command = await asyncio.to_thread(self._accept, payload)
            except MalformedError:
                self._reporter.ignored += 1
                return
            except (EnvelopeError, StalledError) as error:
                self._reporter.tell(EventKind.ORDER_REFUSED, str(error))
                return
            if self._supervisor.run == command.run:
                return  # asked whether it may start, it could be refused for what it causes itself
            try:
                job = await asyncio.to_thread(self._build_job, command)
                if reason := await self._gatekeeper.find_refusal(command.run):
                    raise StalledError(f"this machine is not to train now: {reason}")
            except StalledError as error:
                self._reporter.tell(EventKind.TRAINING_REFUSED, str(error), run=command.run)
                return
            await self._supervisor.start(
                command.run,
                build_job(job),
                patience_s=job.idle_timeout_s + self._settings.training.max_round_s,
                wait_for_refusal=self._gatekeeper.wait_for_refusal,
            )

    async def stop(self) -> None:
        """End the training process, if there is one."""
        await self._supervisor.stop()

    def _accept(self, payload: bytes) -> "WakeCommand":
        # Here, since it brings cryptography: 8 MB that a device that only serves saves.
        from edge_agent.link.commands import CommandGate

        gate = CommandGate(
            self._settings.state_dir / "sequence.json",
            key_path=self._updater.coordinator_key_path,
            fleet=self._settings.fleet,
            device_id=self._settings.device_id,
        )
        command = gate.accept(payload, now_s=time.time())
        if command.floors is not None:
            keep_told(self._settings.state_dir / TOLD_NAME, command.floors)
        return command

    def _build_job(self, command: "WakeCommand") -> TrainingJob:
        settings, federation, version = self._settings, self._settings.federation, self._updater.current()
        identity = settings.identity
        if federation is None:
            raise StalledError("this device only serves: its configuration has no [federation]")
        if command.model != settings.model:
            raise StalledError(f"this device trains {settings.model!r}, not {command.model!r}")
        if version is None or version.manifest.training is None:
            raise StalledError("this device has no version that can be trained")
        return TrainingJob(
            device_id=settings.device_id,
            fleet=settings.fleet,
            model=settings.model,
            run=command.run,
            graph_dir=str(version.directory),
            coordinator_key_pem=self._updater.coordinator_key_path.read_text(encoding="ascii"),
            superlink=federation.superlink,
            ca_path=str(settings.superlink_ca_path),
            node_key_path=str(federation.node_key_path),
            cert_path=None if identity is None else str(identity.cert_path),
            key_path=None if identity is None else str(identity.key_path),
            definition=None if federation.definition is None else str(federation.definition),
            samples_path=str(settings.samples_path),
            samples_key=self._load_samples_key().hex(),
            training_dir=str(settings.training_dir),
            poll_interval_s=command.poll_interval_ms / 1000,
            idle_timeout_s=command.idle_timeout_s,
            epsilon_limit=settings.privacy.epsilon_limit,
            total_epsilon_limit=settings.privacy.total_limit,
            delta=settings.privacy.delta,
            noise_multiplier_limit=settings.privacy.noise_multiplier_limit,
            trusts_coordinator=settings.privacy.trust_coordinator,
            ledger_copy=command.ledger,
        )

    def _take_line(self, run: str, line: bytes) -> None:
        try:
            event = parse_event(line)
        except MalformedError:
            self._reporter.ignored += 1
            return
        if event.event == "trained":
            self._gatekeeper.note_trained(run)
        if kind := _EVENTS.get(event.event):
            self._reporter.tell(kind, event.message, run=run, round_number=event.round, ledger=event.ledger)
        if event.epsilon is not None:
            log.info("%s; epsilon %s in all", event.message, event.epsilon)

    def _note_exit(self, run: str, problem: str | None) -> None:
        if problem is not None:
            self._reporter.tell(EventKind.TRAINING_ENDED, f"the training process {problem}", run=run)
