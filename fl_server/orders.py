"""Signs what the coordinator orders over MQTT."""

import math
import time

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_server.rounds.run import RunSpec
from models.contract.envelope import EVERYONE, RunNotice, WakeCommand, build_envelope
from models.contract.floors import Floors
from models.contract.ledger import LedgerHead

WAKE_LIFETIME_S = 60  # a device that hears of it later is woken again when it says that it is online
_JOIN_ALLOWANCE_S = 3600  # restarts of coordinator or SuperLink, on top of the rounds' deadlines


class Orders:
    """Signed orders of one coordinator, each with a sequence above all before it."""

    def __init__(self, *, fleet: str, key: Ed25519PrivateKey) -> None:
        self._fleet, self._key = fleet, key
        self._sequence = 0

    def build_notice(self, spec: RunSpec, *, is_open: bool) -> bytes:
        """Return the notice that says what the run asks of the fleet."""
        now_s = int(time.time())
        lifetime_s = math.ceil(spec.training.rounds * spec.deadline_s + spec.join_timeout_s) + _JOIN_ALLOWANCE_S
        return build_envelope(
            RunNotice(
                fleet=self._fleet,
                audience=EVERYONE,
                sequence=self._next_sequence(),
                issued_at=now_s,
                expires_at=now_s + lifetime_s,
                model=spec.model,
                run=spec.run,
                state="open" if is_open else "closed",
                privacy=spec.privacy,
                training=spec.training,
            ),
            self._key,
        )

    def build_wake(
        self,
        spec: RunSpec,
        device_id: str,
        *,
        poll_interval_s: float,
        idle_timeout_s: int,
        ledger: LedgerHead,
        floors: Floors | None,
    ) -> bytes:
        """Return the command that lets a device start its training process for the run.

        `ledger` is the copy of the device's, which one that was reinstalled needs; so it does `floors`.
        """
        now_s = int(time.time())
        return build_envelope(
            WakeCommand(
                fleet=self._fleet,
                audience=device_id,
                sequence=self._next_sequence(),
                issued_at=now_s,
                expires_at=now_s + WAKE_LIFETIME_S,
                model=spec.model,
                run=spec.run,
                poll_interval_ms=math.ceil(1000 * poll_interval_s),
                idle_timeout_s=idle_timeout_s,
                ledger=ledger,
                floors=floors,
            ),
            self._key,
        )

    def _next_sequence(self) -> int:
        # Microseconds, so that it also rises over a restart and beside the round driver's.
        self._sequence = max(self._sequence + 1, time.time_ns() // 1000)
        return self._sequence
