"""Drives one run through its rounds; killed at any moment, it goes on with the same round when started again.

    joining --> round --completed--> waiting --"continue"--> round ... --> done
                 | ^
                 | `--abandoned: the same round again, with the updates it has; parameters untouched
                 `--SuperLink lost: another session, then the same round again

Events go out as JSON lines and may repeat: the last completed round is told again after a restart.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_server.errors import RunError
from fl_server.rounds.aggregation import move
from fl_server.rounds.attempt import Attempt
from fl_server.rounds.events import Abandoned, Done, Event, Joined, RoundCompleted
from fl_server.rounds.flower import Reply, Session, SessionLostError
from fl_server.rounds.mechanism import draw_cohort
from fl_server.rounds.optimizers import begin_moments, take_step
from fl_server.rounds.quorum import Decision, may_begin
from fl_server.rounds.run import (
    Checkpoint,
    RunSpec,
    build_round_dir,
    load_checkpoint,
    load_cohort,
    load_moments,
    load_parameters,
    load_sequence,
    load_spec,
    save_checkpoint,
    save_cohort,
    save_moments,
    save_sequence,
)
from fl_server.rounds.spool import UPDATES_NAME, Spool, list_spooled
from fl_server.rounds.words import Permits
from models.contract.encoding import build_digest
from models.contract.envelope import TrainOrder, build_envelope
from models.contract.privacy import Unit
from models.tensors.layout import Vector, build_vector_bytes
from models.tensors.noise import Entropy

_log = logging.getLogger(__name__)

RETRIES = 3  # of one round, before the run is given up
SESSIONS_MAX = 10  # lost in one round, before the run is given up: it is the round that breaks them
POLL_FIRST_S, POLL_GROWTH, POLL_MAX_S = 0.1, 1.2, 0.5
ONLINE_POLL_S = 0.25
REOPEN_S = 1.0
_TOO_FEW_ONLINE = "fewer of the devices that were drawn are online than the quorum asks for"
_TOO_FEW_UPDATES = "fewer updates came than the quorum asks for"


class Exchange(Protocol):
    """Carries one round's messages to its devices and back, as `Session` does over a SuperLink."""

    def list_online(self) -> set[int]: ...
    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None: ...
    def collect(self) -> Iterator[Reply]: ...
    def forget(self) -> None: ...


class Driver:
    """The run in `run_dir`, from its last checkpoint on."""

    def __init__(
        self,
        run_dir: Path,
        *,
        words: Permits,
        emit: Callable[[Event], None],
        open_exchange: Callable[[RunSpec], AbstractContextManager[Exchange]] | None = None,
        entropy: Entropy = os.urandom,
    ) -> None:
        """Load the run; nothing is opened.

        Args:
            run_dir: As `create_run` made it.
            words: Permit rounds, and say who is gone.
            emit: Takes what happened.
            open_exchange: Reaches the devices; without it the SuperLink of the run does.
            entropy: Of cohorts and noise; only a simulation passes its own.
        """
        self._run_dir, self._words, self._emit, self._entropy = run_dir, words, emit, entropy
        self._open_exchange = open_exchange or _open_session
        self._spec = load_spec(run_dir)
        self._key = _load_order_key(Path(self._spec.order_key_path))
        checkpoint = load_checkpoint(run_dir, only_newest=self._spec.privacy.unit is Unit.DEVICE)
        self._completed = checkpoint.round if checkpoint else 0
        self._parameters = load_parameters(run_dir, self._spec.layout, self._completed)
        self._privacy, self._moments = self._spec.privacy, begin_moments(self._spec.optimizer, self._spec.layout.size)
        if checkpoint and self._moments.first.size:
            self._moments = load_moments(run_dir, self._completed)
        if checkpoint and checkpoint.clipping_norm:
            self._privacy = replace(self._privacy, clipping_norm=checkpoint.clipping_norm)
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
        devices = self._spec.devices
        updates_dir = build_round_dir(self._run_dir, self._completed + 1) / UPDATES_NAME
        quorum = max(0, self._spec.quorum - len(list_spooled(updates_dir)))
        online = self._await_devices(session, set(devices.values()), wanted=len(devices), quorum=quorum)
        self._emit(Joined(devices=tuple(sorted(name for name, node in self._spec.devices.items() if node in online))))

    def _await_devices(self, session: Exchange, nodes: set[int], *, wanted: int, quorum: int) -> set[int]:
        """Return which of `nodes` are online, as soon as enough are."""
        started = time.monotonic()
        while True:
            online = session.list_online() & nodes
            ready = len(online)
            decision = may_begin(
                ready=ready,
                wanted=wanted,
                quorum=quorum,
                elapsed_s=time.monotonic() - started,
                timeout_s=self._spec.join_timeout_s,
            )
            if decision is Decision.COMPLETE:
                return online
            if decision is Decision.ABANDON:
                reason = f"{ready} of {len(nodes)} devices are online, the quorum is {quorum}"
                if self._privacy.unit is Unit.DEVICE:
                    reason = _TOO_FEW_ONLINE  # how many were drawn stays here
                self._emit(Abandoned(round=self._completed + 1, reason=reason))
                raise RunError(f"round {self._completed + 1}: {reason}")
            self._words.pause(ONLINE_POLL_S)

    def _advance(self, session: Exchange) -> None:
        if not self._is_permitted:
            self._words.wait_for_permit()
            self._is_permitted = True
        cohort = self._choose_cohort(self._completed + 1)
        directory = build_round_dir(self._run_dir, self._completed + 1)
        attempt = Attempt(self._spec, self._privacy, self._completed + 1, directory, cohort=cohort)
        left = {name: node for name, node in cohort.items() if name not in attempt.spool.devices}
        quorum = max(0, attempt.quorum - attempt.fold.count)
        online = self._await_devices(session, set(left.values()), wanted=quorum, quorum=quorum)
        attempt.ask({name: node for name, node in left.items() if node in online})
        if self._exchange(session, attempt) is Decision.COMPLETE:
            self._complete(attempt)
        else:
            self._abandon(attempt)
        session.forget()

    def _choose_cohort(self, number: int) -> dict[str, int]:
        """Return the node ids of those who are to take part in round `number`: all, or as they were drawn."""
        devices = self._spec.devices
        if self._privacy.unit is not Unit.DEVICE:
            return devices
        cohort = load_cohort(self._run_dir, number)
        if cohort is None:
            cohort = draw_cohort(devices, self._privacy.sampling_rate, self._entropy)
            save_cohort(self._run_dir, number, cohort)
        if unknown := set(cohort) - devices.keys():
            raise RunError(f"round {number} was drawn for {min(unknown)!r}, which is none of the run's devices")
        return {name: devices[name] for name in cohort}

    def _exchange(self, session: Exchange, attempt: Attempt) -> Decision:
        self._words.take_gone()  # what was said before this attempt is not about it
        session.send(self._parameters, self._build_orders(attempt), lifetime_s=self._spec.deadline_s)
        pause_s = POLL_FIRST_S
        while True:
            for reply in session.collect():
                pause_s = POLL_FIRST_S
                refusal = attempt.take(reply)
                if refusal:
                    self._emit(refusal)
            attempt.gone |= {name for name, number in self._words.take_gone() if number == attempt.number}
            decision = attempt.decide()
            if decision is not Decision.WAIT:
                return decision
            self._words.pause(pause_s)
            pause_s = min(pause_s * POLL_GROWTH, POLL_MAX_S)

    def _complete(self, attempt: Attempt) -> None:
        step = attempt.compute_step(self._entropy)
        step, self._moments = take_step(self._spec.optimizer, self._moments, step)
        self._parameters = move(self._parameters, step)
        self._privacy = attempt.adapt_clipping(self._entropy)
        if self._moments.first.size:
            save_moments(self._run_dir, attempt.number, self._moments)
        checkpoint = save_checkpoint(
            self._run_dir,
            self._spec.layout,
            self._parameters,
            number=attempt.number,
            accepted=tuple(sorted(attempt.spool.devices)),
            missing=tuple(sorted(set(attempt.cohort) - attempt.spool.devices)),
            seconds=attempt.elapsed_s,
            clipping_norm=self._privacy.clipping_norm if self._spec.clipping_quantile else None,
        )
        self._completed, self._is_permitted = attempt.number, False
        self._abandoned = self._sessions = 0
        self._conclude(checkpoint)

    def _conclude(self, checkpoint: Checkpoint) -> None:
        Spool(build_round_dir(self._run_dir, checkpoint.round) / UPDATES_NAME, self._spec.layout.size).clear()
        self._emit(
            RoundCompleted(
                round=checkpoint.round,
                accepted=checkpoint.accepted,
                missing=checkpoint.missing,
                seconds=checkpoint.seconds,
            )
        )

    def _abandon(self, attempt: Attempt) -> None:
        reason = f"{attempt.fold.count} of {len(attempt.cohort)} updates, the quorum is {attempt.quorum}"
        if self._privacy.unit is Unit.DEVICE:
            reason = _TOO_FEW_UPDATES
        self._emit(Abandoned(round=attempt.number, reason=reason))
        self._abandoned += 1
        if self._abandoned > RETRIES:
            raise RunError(f"round {attempt.number} was abandoned {self._abandoned} times: {reason}")

    def _build_orders(self, attempt: Attempt) -> dict[int, bytes]:
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
                    privacy=self._privacy,
                    training=self._spec.training,
                ),
                self._key,
            )
            for sequence, (node, device_id) in enumerate(attempt.waiting.items(), start=first)
        }


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
