"""Drives one run through its rounds; killed at any moment, it goes on with the same round when started again.

    joining --> round --completed--> waiting --"continue"--> round ... --> done
                 | ^
                 | `--abandoned: the same round again, with the updates it has; parameters untouched
                 `--SuperLink lost: another session, then the same round again

Events go out as JSON lines and may repeat: the last completed round is told again after a restart.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_server.errors import RunError
from fl_server.rounds.aggregation import MeanFold, check_update
from fl_server.rounds.events import Abandoned, Done, Event, Joined, RoundCompleted, UpdateRefused
from fl_server.rounds.flower import Reply, Session, SessionLostError
from fl_server.rounds.quorum import Decision, decide_round, may_begin
from fl_server.rounds.robust import aggregate
from fl_server.rounds.run import (
    Checkpoint,
    RunSpec,
    build_round_dir,
    load_checkpoint,
    load_parameters,
    load_sequence,
    load_spec,
    save_checkpoint,
    save_sequence,
)
from fl_server.rounds.spool import Spool
from models.contract.encoding import build_digest
from models.contract.envelope import TrainOrder, build_envelope
from models.tensors.layout import Vector, build_vector_bytes

_log = logging.getLogger(__name__)

RETRIES = 3  # of one round, before the run is given up
SESSIONS_MAX = 10  # lost in one round, before the run is given up: it is the round that breaks them
POLL_FIRST_S, POLL_GROWTH, POLL_MAX_S = 0.1, 1.2, 0.5
ONLINE_POLL_S = 0.25
REOPEN_S = 1.0


class StoppedError(RunError):
    """The coordinator said stop, or is gone; the run goes on when its driver is started again."""


class Exchange(Protocol):
    """Carries one round's messages to its devices and back, as `Session` does over a SuperLink."""

    def list_online(self) -> set[int]: ...
    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None: ...
    def collect(self) -> Iterator[Reply]: ...
    def forget(self) -> None: ...


class Permits(Protocol):
    """Says when the run goes on, as `Words` of the coordinator do."""

    def wait_for_permit(self) -> None: ...
    def pause(self, seconds: float) -> None: ...


class Words:
    """What the coordinator says, one word a line: "continue" or "stop"; the end of the stream means stop."""

    def __init__(self, stream: TextIO) -> None:
        self._permits, self._stopped = threading.Semaphore(0), threading.Event()
        threading.Thread(target=self._listen, args=(stream,), daemon=True).start()

    def wait_for_permit(self) -> None:
        """Return at the next "continue"; raises StoppedError."""
        self._permits.acquire()
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Return after `seconds`; raises StoppedError as soon as it is said."""
        if self._stopped.wait(seconds):
            raise StoppedError("stopped")

    def _listen(self, stream: TextIO) -> None:
        for line in stream:
            if line.strip() == "continue":
                self._permits.release()
            elif line.strip() == "stop":
                break
        self._stopped.set()
        self._permits.release()


class Driver:
    """The run in `run_dir`, from its last checkpoint on."""

    def __init__(
        self,
        run_dir: Path,
        *,
        words: Permits,
        emit: Callable[[Event], None],
        open_exchange: Callable[[RunSpec], AbstractContextManager[Exchange]] | None = None,
    ) -> None:
        """Load the run; nothing is opened.

        Args:
            run_dir: As `create_run` made it.
            words: Permit rounds.
            emit: Takes what happened.
            open_exchange: Reaches the devices; without it the SuperLink of the run does.
        """
        self._run_dir, self._words, self._emit = run_dir, words, emit
        self._open_exchange = open_exchange or _open_session
        self._spec = load_spec(run_dir)
        self._key = _load_order_key(Path(self._spec.order_key_path))
        checkpoint = load_checkpoint(run_dir)
        self._completed = checkpoint.round if checkpoint else 0
        self._parameters = load_parameters(run_dir, self._spec.layout, self._completed)
        self._abandoned = self._sessions = 0  # of the round under way
        self._is_permitted = checkpoint is None
        if checkpoint:
            self._conclude(checkpoint)

    def run(self) -> None:
        """Complete the rounds that are left.

        Raises:
            RunError: Too few devices came, a round was abandoned too often, or the SuperLink stays away.
            StoppedError: The coordinator said stop.
        """
        away_since: float | None = None
        while self._completed < self._spec.training.rounds:
            try:
                with self._open_exchange(self._spec) as session:
                    away_since, self._sessions = None, self._sessions + 1
                    self._join(session)
                    while self._completed < self._spec.training.rounds:
                        self._advance(session)
            except SessionLostError as error:
                _log.warning("%s", error)
                away_since = away_since or time.monotonic()
                away_s = time.monotonic() - away_since
                if away_s > self._spec.join_timeout_s or self._sessions >= SESSIONS_MAX:
                    raise
                self._words.pause(REOPEN_S)
        self._emit(Done())

    def _join(self, session: Exchange) -> None:
        online = self._await_devices(session, wanted=len(self._spec.devices))
        self._emit(Joined(devices=tuple(sorted(name for name, node in self._spec.devices.items() if node in online))))

    def _await_devices(self, session: Exchange, *, wanted: int) -> set[int]:
        """Return the nodes that are online, as soon as enough of the run's are."""
        started = time.monotonic()
        while True:
            online = session.list_online()
            ready = len(online.intersection(self._spec.devices.values()))
            decision = may_begin(
                ready=ready,
                wanted=wanted,
                quorum=self._spec.quorum,
                elapsed_s=time.monotonic() - started,
                timeout_s=self._spec.join_timeout_s,
            )
            if decision is Decision.COMPLETE:
                return online
            if decision is Decision.ABANDON:
                reason = f"{ready} of {len(self._spec.devices)} devices are online, the quorum is {self._spec.quorum}"
                self._emit(Abandoned(round=self._completed + 1, reason=reason))
                raise RunError(f"round {self._completed + 1}: {reason}")
            self._words.pause(ONLINE_POLL_S)

    def _advance(self, session: Exchange) -> None:
        if not self._is_permitted:
            self._words.wait_for_permit()
            self._is_permitted = True
        online = self._await_devices(session, wanted=self._spec.quorum)
        attempt = _Attempt(self._spec, self._completed + 1, build_round_dir(self._run_dir, self._completed + 1))
        attempt.ask({name: node for name, node in self._spec.devices.items() if node in online})
        if self._exchange(session, attempt) is Decision.COMPLETE:
            self._complete(attempt)
        else:
            self._abandon(attempt)
        session.forget()

    def _exchange(self, session: Exchange, attempt: "_Attempt") -> Decision:
        session.send(self._parameters, self._build_orders(attempt), lifetime_s=self._spec.deadline_s)
        pause_s = POLL_FIRST_S
        while True:
            for reply in session.collect():
                pause_s = POLL_FIRST_S
                refusal = attempt.take(reply)
                if refusal:
                    self._emit(refusal)
            decision = attempt.decide()
            if decision is not Decision.WAIT:
                return decision
            self._words.pause(pause_s)
            pause_s = min(pause_s * POLL_GROWTH, POLL_MAX_S)

    def _complete(self, attempt: "_Attempt") -> None:
        self._parameters = attempt.move(self._parameters)
        checkpoint = save_checkpoint(
            self._run_dir,
            self._spec.layout,
            self._parameters,
            number=attempt.number,
            accepted=tuple(sorted(attempt.spool.devices)),
            missing=tuple(sorted(set(self._spec.devices) - attempt.spool.devices)),
            seconds=attempt.elapsed_s,
        )
        self._completed, self._is_permitted = attempt.number, False
        self._abandoned = self._sessions = 0
        self._conclude(checkpoint)

    def _conclude(self, checkpoint: Checkpoint) -> None:
        Spool(build_round_dir(self._run_dir, checkpoint.round) / "updates", self._spec.layout.size).clear()
        self._emit(
            RoundCompleted(
                round=checkpoint.round,
                accepted=checkpoint.accepted,
                missing=checkpoint.missing,
                seconds=checkpoint.seconds,
            )
        )

    def _abandon(self, attempt: "_Attempt") -> None:
        reason = f"{attempt.fold.count} of {len(self._spec.devices)} updates, the quorum is {self._spec.quorum}"
        self._emit(Abandoned(round=attempt.number, reason=reason))
        self._abandoned += 1
        if self._abandoned > RETRIES:
            raise RunError(f"round {attempt.number} was abandoned {self._abandoned} times: {reason}")

    def _build_orders(self, attempt: "_Attempt") -> dict[int, bytes]:
        """Return the envelopes of an attempt by node id; their sequences are used up, durably, before they are sent."""
        now_s = time.time()
        digest = build_digest(build_vector_bytes(self._parameters))
        first = max(load_sequence(self._run_dir) + 1, int(now_s * 1e6))
        save_sequence(self._run_dir, first + len(attempt.waiting))
        return {
            node: build_envelope(
                TrainOrder(
                    fleet=self._spec.fleet,
                    audience=device_id,
                    sequence=sequence,
                    issued_at=int(now_s),
                    expires_at=math.ceil(now_s + self._spec.deadline_s),
                    model=self._spec.model,
                    graph_digest=self._spec.graph_digest,
                    parameters_digest=digest,
                    run=self._spec.run,
                    round=attempt.number,
                    privacy=self._spec.privacy,
                    training=self._spec.training,
                ),
                self._key,
            )
            for sequence, (node, device_id) in enumerate(attempt.waiting.items(), start=first)
        }


class _Attempt:
    """One try at a round: who was asked, and what counts so far, updates of earlier tries included."""

    def __init__(self, spec: RunSpec, number: int, directory: Path) -> None:
        self._spec, self.number = spec, number
        self._started = time.monotonic()
        self.spool = Spool(directory / "updates", spec.layout.size)
        self.fold = MeanFold(spec.layout.size)
        for update in self.spool.read():
            self.fold.add(update)
        self.waiting: dict[int, str] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def ask(self, online: dict[str, int]) -> None:
        self.waiting = {node: name for name, node in online.items() if name not in self.spool.devices}

    def take(self, reply: Reply) -> UpdateRefused | None:
        """Count the reply, if it may count; return why it does not."""
        device_id = self.waiting.pop(reply.node_id, None)
        if device_id is None:
            return None
        if reply.update is None and not reply.failure:
            _log.warning("round %d: %s went away", self.number, device_id)
            return None
        update: Vector | str = reply.failure
        if reply.update is not None:
            update = check_update(
                reply.update,
                size=self._spec.layout.size,
                norm_limit=float(self._spec.update_norm_limit),
                uplink=self._spec.training.uplink,
            )
        if isinstance(update, str):
            return UpdateRefused(round=self.number, device=device_id, reason=update)
        if self.spool.add(device_id, update):
            self.fold.add(update)
        return None

    def move(self, parameters: Vector) -> Vector:
        """Return `parameters` moved by what the run's rule makes of the accepted updates."""
        if self._spec.aggregation.rule == "mean":
            return self.fold.apply(parameters)
        step = aggregate(
            self.spool.read_columns,
            count=len(self.spool.devices),
            size=self._spec.layout.size,
            aggregation=self._spec.aggregation,
        )
        step += parameters
        return step.astype(np.float32)

    def decide(self) -> Decision:
        return decide_round(
            accepted=self.fold.count,
            waiting=len(self.waiting),
            quorum=self._spec.quorum,
            elapsed_s=self.elapsed_s,
            deadline_s=self._spec.deadline_s,
        )


def _open_session(spec: RunSpec) -> Session:
    return Session(
        address=spec.superlink,
        ca_path=Path(spec.ca_path),
        superexec_secret_path=Path(spec.superexec_secret_path),
        size=spec.layout.size,
    )


def _load_order_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot read the key that signs orders ({type(error).__name__})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RunError(f"{path}: the key that signs orders must be Ed25519")
    return key
