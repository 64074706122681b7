"""One try at a round, from who is asked to the step that its updates come to."""

import logging
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from fl_server.rounds.aggregation import Floats, SumFold, check_update
from fl_server.rounds.events import UpdateRefused
from fl_server.rounds.flower import Reply
from fl_server.rounds.mechanism import (
    adapt_clipping_norm,
    compute_expected_cohort,
    compute_sum_noise,
    is_uncut,
    noise_sum,
)
from fl_server.rounds.quorum import Decision, decide_round
from fl_server.rounds.robust import aggregate
from fl_server.rounds.run import RunSpec
from fl_server.rounds.spool import UPDATES_NAME, Spool
from models.contract.privacy import PrivacyPlan, Unit
from models.tensors.layout import Vector
from models.tensors.noise import Entropy
from models.tensors.norms import clip_norm, l2_norm

_log = logging.getLogger(__name__)

_BROKEN_NORM = 2.0  # clipping norms: no device that clips sends an update so long, however it travels


class Attempt:
    """One try at a round: who was asked, and what counts so far, updates of earlier tries included.

    Attributes:
        waiting: Who has not replied, by node id.
        gone: Who is not waited for any more. A reply of theirs counts as long as others are: nobody is left out for
            having been late, only for the round being over. Of unit `device` it never counts: whether a device is in the
            sum must not depend on how long others train, which their data may tell.
    """

    def __init__(
        self, spec: RunSpec, privacy: PrivacyPlan, number: int, directory: Path, *, cohort: dict[str, int]
    ) -> None:
        self._spec, self._privacy, self.number, self.cohort = spec, privacy, number, cohort
        self.quorum = min(spec.quorum, len(cohort))
        self._started = time.monotonic()
        self.spool = Spool(directory / UPDATES_NAME, spec.layout.size)
        self.fold = SumFold(spec.layout.size)
        self._uncut = 0
        for update in self.spool.read():
            self._count(update)
        self.waiting: dict[int, str] = {}
        self.gone: set[str] = set()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def ask(self, online: dict[str, int]) -> None:
        """Wait for the updates of these devices, by name, from now on."""
        self._started = time.monotonic()
        self.waiting = {node: name for name, node in online.items()}

    def take(self, reply: Reply) -> UpdateRefused | None:
        """Count the reply, if it may count; return why it does not."""
        device_id = self.waiting.pop(reply.node_id, None)
        if device_id is None:
            return None
        if reply.update is None and not reply.failure:
            _log.warning("round %d: %s went away", self.number, device_id)
            return None
        update: Vector | str = reply.failure if reply.update is None else self._check(reply.update)
        if self._spec.privacy.unit is Unit.DEVICE and device_id in self.gone:
            update = "it came when its device was not waited for any more"
        if isinstance(update, str):
            return UpdateRefused(round=self.number, device=device_id, reason=update)
        if self.spool.add(device_id, update):
            self._count(update)
        return None

    def compute_step(self, entropy: Entropy) -> Floats:
        """Return what the run's rule makes of the accepted updates, shape (n,); of unit `device` with its noise on it.

        What it returns has not been seen by anybody, so that a killed driver may draw other noise.
        """
        spec = self._spec
        if spec.privacy.unit is Unit.DEVICE:
            noise_sum(
                self.fold.sum,
                clipping_norm=float(self._privacy.clipping_norm),
                noise_multiplier=compute_sum_noise(
                    self._privacy, self._expected_cohort, is_adaptive=spec.clipping_quantile is not None
                ),
                entropy=entropy,
            )
            return self.fold.finish(self._expected_cohort)
        if spec.aggregation.rule == "mean":
            return self.fold.finish(self.fold.count)
        return aggregate(
            self.spool.read_columns,
            count=len(self.spool.devices),
            size=spec.layout.size,
            aggregation=spec.aggregation,
        )

    def adapt_clipping(self, entropy: Entropy) -> PrivacyPlan:
        """Return the plan of the next round."""
        quantile = self._spec.clipping_quantile
        if quantile is None:
            return self._privacy
        clipping_norm = adapt_clipping_norm(
            float(self._privacy.clipping_norm),
            self._uncut,
            self.fold.count,
            target=float(quantile),
            expected_cohort=self._expected_cohort,
            entropy=entropy,
        )
        return replace(self._privacy, clipping_norm=Decimal(f"{clipping_norm:.6g}"))

    def decide(self) -> Decision:
        return decide_round(
            accepted=self.fold.count,
            waiting=len(set(self.waiting.values()) - self.gone),
            quorum=self.quorum,
            elapsed_s=self.elapsed_s,
            deadline_s=self._spec.deadline_s,
        )

    @property
    def _expected_cohort(self) -> float:
        return compute_expected_cohort(self._spec.privacy, len(self._spec.devices))

    def _check(self, data: bytes) -> Vector | str:
        """Return the update in `data` as it counts, or why it does not."""
        spec, is_bounded = self._spec, self._spec.privacy.unit is Unit.DEVICE
        limit = _BROKEN_NORM * float(self._privacy.clipping_norm) if is_bounded else float(spec.update_norm_limit)
        update = check_update(data, size=spec.layout.size, norm_limit=limit, uplink=spec.training.uplink)
        if is_bounded and not isinstance(update, str):
            return clip_norm(update, float(self._privacy.clipping_norm))  # its word that it did is not enough
        return update

    def _count(self, update: Vector) -> None:
        self.fold.add(update)
        if self._spec.clipping_quantile is not None:
            self._uncut += is_uncut(l2_norm(update), float(self._privacy.clipping_norm), self._spec.training.uplink)
