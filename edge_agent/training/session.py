"""What the training process does with one train message.

    envelope --opened--> stored? --yes-------------------------------------------------------> sent again
                            `no--> spend, fsync --> train --> keep local, store update, fsync --> sent

Whatever does not fit is answered with nothing, and an event says why. An order that failed after its spend
stays charged; the coordinator's retry spends again, or is refused.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.errors import AgentError, StalledError
from edge_agent.training.budget import Entry, Limits, Spend, compute_total
from edge_agent.training.job import TrainingEvent, TrainingJob
from edge_agent.training.ledger import Ledger
from edge_agent.training.local import LocalParameters
from edge_agent.training.updates import UpdateStore
from models.contract.encoding import build_digest
from models.contract.envelope import TrainOrder, open_envelope
from models.contract.errors import ContractError, EnvelopeError
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Vector
from models.tensors.uplink import encode_update


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSession:
    """Answers the train messages of one run.

    Attributes:
        graph_digest: Of the graph that says what `train` trains.
        size: Number of parameters that come and go.
        key: The coordinator's, which signs orders.
        local: The parameters that stay.
        train: Of all parameters, makes one round's update, as private as its plan says; called only for what was charged.
        report: Takes what happened.
        now_s: Unix time, s.
    """

    job: TrainingJob
    graph_digest: str
    size: int
    key: Ed25519PublicKey
    ledger: Ledger
    updates: UpdateStore
    local: LocalParameters
    train: Callable[[Vector, PrivacyPlan, TrainingPlan], Vector]
    report: Callable[[TrainingEvent], None]
    now_s: Callable[[], float] = time.time

    def handle(self, parameters: Vector, envelope: bytes) -> bytes | None:
        """Return the update that `envelope` orders, as the order wants it encoded; None if it is not to be had."""
        try:
            order = open_envelope(
                envelope,
                TrainOrder,
                key=self.key,
                fleet=self.job.fleet,
                audience=self.job.device_id,
                now_s=self.now_s(),
            )
            self._check_fits(order, parameters)
            self._check_trusted(order.privacy)
            stored = self.updates.find(order.run, order.round)
            if stored is None:
                check_not_replayed(order, self.ledger.entries)
                return self._train(order, parameters)
        except ContractError as error:
            self.report(TrainingEvent(event="order_refused", message=str(error)))
            return None
        except AgentError as error:
            self._report("refused", str(error), order)
            return None
        self._report("resent", f"round {order.round} of run {order.run!r} sent again", order)
        return stored

    def _train(self, order: TrainOrder, parameters: Vector) -> bytes:
        """Return the update, charged, encoded and stored; raises AgentError."""
        spend = Spend(
            order_sequence=order.sequence,
            model=order.model,
            run=order.run,
            round=order.round,
            privacy=order.privacy,
            steps=order.privacy.count_charged_steps(order.training),
        )
        limits = Limits(
            epsilon=self.job.epsilon_limit,
            total_epsilon=self.job.total_epsilon_limit,
            delta=self.job.delta,
            noise_multiplier=self.job.noise_multiplier_limit,
        )
        self.ledger.spend(spend, limits, at=int(self.now_s()))
        begun = self.local.begin(order.run, order.round, order.privacy.unit)
        moved = self.train(self.local.join(parameters, begun), order.privacy, order.training)
        shared = self.local.keep(order.run, order.round, order.privacy.unit, begun=begun, moved=moved)
        update = encode_update(shared, order.training.uplink, np.random.default_rng())
        if order.privacy.unit is Unit.SAMPLE:  # without noise on it, it is not left lying: the retry is paid for, too
            self.updates.save(order.run, order.round, update)
        self._report("trained", f"round {order.round} of run {order.run!r} trained", order)
        return update

    def _check_trusted(self, privacy: PrivacyPlan) -> None:
        """Raise StalledError for an update without noise that the device's owner has not agreed to."""
        if privacy.unit is Unit.DEVICE and not self.job.trusts_coordinator:
            raise StalledError(
                "a run of the privacy unit 'device' shows the coordinator this device's update before there is noise on "
                "it; its owner has not set privacy.trust_coordinator"
            )

    def _check_fits(self, order: TrainOrder, parameters: Vector) -> None:
        """Raise EnvelopeError unless `order` is for this run and graph, and for these parameters."""
        for what, found, expected in (
            ("model", order.model, self.job.model),
            ("run", order.run, self.job.run),
            ("training graph", order.graph_digest, self.graph_digest),
        ):
            if found != expected:
                raise EnvelopeError(f"the order is for {what} {found!r}, this is {expected!r}")
        if parameters.dtype != np.float32 or parameters.shape != (self.size,):
            raise EnvelopeError(
                f"the parameters are {parameters.dtype} {parameters.shape}, expected float32 ({self.size},)"
            )
        if build_digest(parameters.astype("<f4").tobytes()) != order.parameters_digest:
            raise EnvelopeError("the parameters are not those of the order")
        if not np.isfinite(parameters).all():
            raise EnvelopeError("the parameters are not finite")

    def _report(self, event: Literal["trained", "resent", "refused"], message: str, order: TrainOrder) -> None:
        spent = [entry for entry in self.ledger.entries if entry.model == self.job.model]
        epsilon = str(compute_total(spent, self.job.delta))
        ledger = self.ledger.head if event == "trained" else None
        self.report(TrainingEvent(event=event, message=message, round=order.round, epsilon=epsilon, ledger=ledger))


def check_not_replayed(order: TrainOrder, entries: Sequence[Entry]) -> None:
    """Raise EnvelopeError if a newer order than `order` was acted on, or this one for another round.

    The same order may come again: its update may have been lost.
    """
    newest = max(entries, key=lambda entry: entry.order_sequence, default=None)
    if newest is None or order.sequence > newest.order_sequence:
        return
    if (order.sequence, order.run, order.round) != (newest.order_sequence, newest.run, newest.round):
        raise EnvelopeError(
            f"order {order.sequence} is replayed: order {newest.order_sequence}, for round {newest.round} of run "
            f"{newest.run!r}, was acted on"
        )
