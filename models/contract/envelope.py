"""Signed orders of the coordinator: what may make a device train.

An envelope carries the exact bytes that were signed, so nothing is re-encoded before it is checked.
The signature is Ed25519; the key reaches devices as a TUF target.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from models.contract.encoding import build_canonical, build_json, check_digest_text, parse_json
from models.contract.errors import EnvelopeError
from models.contract.floors import Floors
from models.contract.ledger import LedgerHead
from models.contract.privacy import PrivacyPlan, TrainingPlan
from models.contract.topics import check_name

EVERYONE = "*"
CLOCK_SKEW_S = 300  # as far behind as Flower lets a node be


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What all orders say first.

    Attributes:
        audience: The device it is for, or "*".
        sequence: Rises with every order of the coordinator; a device acts on each once.
        issued_at: Unix time, s.
        expires_at: Unix time, s; the order is void from then on.
    """

    schema_version: Literal[1] = 1
    fleet: str
    audience: str
    sequence: int
    issued_at: int
    expires_at: int

    def __post_init__(self) -> None:
        check_name(self.fleet, "fleet")
        if self.audience != EVERYONE:
            check_name(self.audience, "audience")
        if self.sequence < 0 or self.expires_at <= self.issued_at:
            raise ValueError("sequence must be >= 0 and expires_at after issued_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNotice(Order):
    """Retained on the model's run topic: what a run asks of the fleet, for all to see."""

    kind: Literal["run"] = "run"
    model: str
    run: str
    state: Literal["open", "closed"]
    privacy: PrivacyPlan
    training: TrainingPlan

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        check_name(self.model, "model")
        check_name(self.run, "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeCommand(Order):
    """On a device's command topic: join the run with a training process.

    Attributes:
        poll_interval_ms: How often the process may ask the SuperLink for messages.
        idle_timeout_s: After how long without a message it ends.
        ledger: What the device has spent at least, as the coordinator knows: the larger spend wins. None if it
            says nothing of it, and then a device without a ledger does not train.
        floors: What the coordinator has signed last: an offer that is older is refused.
    """

    kind: Literal["wake"] = "wake"
    model: str
    run: str
    poll_interval_ms: int
    idle_timeout_s: int
    ledger: LedgerHead | None = None
    floors: Floors | None = None

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        check_name(self.model, "model")
        check_name(self.run, "run")
        if not 10 <= self.poll_interval_ms <= 600_000 or not 1 <= self.idle_timeout_s <= 86_400:
            raise ValueError("poll_interval_ms must be in 10..600000 and idle_timeout_s in 1..86400")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOrder(Order):
    """Inside every Flower train message: exactly what may be trained, once.

    Attributes:
        graph_digest: Of the graph that says what the device must train.
        parameters_digest: Of the little-endian float32 bytes of the parameters in the message.
        round: Counts from 1 to `training.rounds`.
    """

    kind: Literal["train"] = "train"
    model: str
    graph_digest: str
    parameters_digest: str
    run: str
    round: int
    privacy: PrivacyPlan
    training: TrainingPlan

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        check_name(self.model, "model")
        check_name(self.run, "run")
        check_digest_text(self.graph_digest)
        check_digest_text(self.parameters_digest)
        if not 1 <= self.round <= self.training.rounds:
            raise ValueError(f"round {self.round} is not in 1..{self.training.rounds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope:
    payload: str
    signature: bytes  # base64 in JSON


_Order = TypeVar("_Order", bound=Order)


def build_envelope(order: Order, key: Ed25519PrivateKey) -> bytes:
    """Return `order` signed with `key`, as JSON."""
    payload = build_canonical(order)
    return build_json(_Envelope(payload=payload.decode(), signature=key.sign(payload)))


def open_envelope(
    data: bytes, kind: type[_Order], *, key: Ed25519PublicKey, fleet: str, audience: str, now_s: float
) -> _Order:
    """Return the order of type `kind` in `data`, if it is genuine, fresh and for `audience`.

    Raises:
        MalformedError: The bytes are no envelope, or no order of this kind.
        EnvelopeError: Signature, fleet, audience or time do not fit.
    """
    envelope = parse_json(data, _Envelope)
    payload = envelope.payload.encode()
    try:
        key.verify(envelope.signature, payload)
    except InvalidSignature as error:
        raise EnvelopeError("the signature is not the coordinator's") from error
    order = parse_json(payload, kind)
    if order.fleet != fleet:
        raise EnvelopeError(f"the order is for fleet {order.fleet!r}, this is {fleet!r}")
    if order.audience not in (audience, EVERYONE):
        raise EnvelopeError(f"the order is for {order.audience!r}, this is {audience!r}")
    if now_s >= order.expires_at:
        raise EnvelopeError(f"the order expired {now_s - order.expires_at:.0f} s ago")
    if now_s < order.issued_at - CLOCK_SKEW_S:
        raise EnvelopeError(f"the order is dated {order.issued_at - now_s:.0f} s ahead of this clock")
    return order
