"""A command is acted on once, or refused."""

from decimal import Decimal
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_agent.errors import StalledError
from edge_agent.link.commands import CommandGate
from models.contract.envelope import WakeCommand, build_envelope
from models.contract.errors import EnvelopeError, MalformedError
from models.contract.ledger import LedgerHead, Spent

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
NOW_S = 1_000_000.0


def command(*, key: Ed25519PrivateKey = KEY, **changes: object) -> bytes:
    fields: dict = {
        "fleet": "f",
        "audience": "d",
        "sequence": 7,
        "issued_at": 1_000_000,
        "expires_at": 1_000_060,
        "model": "m",
        "run": "r",
        "poll_interval_ms": 1000,
        "idle_timeout_s": 60,
    }
    return build_envelope(WakeCommand(**{**fields, **changes}), key)


@pytest.fixture
def gate(tmp_path: Path) -> CommandGate:
    (tmp_path / "key.pem").write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return open_gate(tmp_path)


def open_gate(directory: Path) -> CommandGate:
    return CommandGate(directory / "sequence.json", key_path=directory / "key.pem", fleet="f", device_id="d")


def test_genuine_command_passes_once_also_after_a_restart(gate: CommandGate, tmp_path: Path) -> None:
    assert gate.accept(command(), now_s=NOW_S).run == "r"
    for again in (gate, open_gate(tmp_path)):
        with pytest.raises(EnvelopeError, match="7 comes after command 7"):
            again.accept(command(), now_s=NOW_S)
        with pytest.raises(EnvelopeError, match="6 comes after"):
            again.accept(command(sequence=6), now_s=NOW_S)
    assert gate.accept(command(sequence=8, audience="*"), now_s=NOW_S).sequence == 8


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (command(key=Ed25519PrivateKey.generate()), "not the coordinator's"),
        (command(fleet="other"), "fleet 'other'"),
        (command(audience="e"), "for 'e'"),
        (command(issued_at=1, expires_at=1_000_000), "expired"),
        (command(issued_at=1_000_400, expires_at=1_000_500), "ahead"),
    ],
)
def test_command_that_is_not_for_now_and_here_is_refused(gate: CommandGate, payload: bytes, said: str) -> None:
    with pytest.raises(EnvelopeError, match=said):
        gate.accept(payload, now_s=NOW_S)
    assert gate.accept(command(), now_s=NOW_S).sequence == 7


def test_copy_of_the_ledger_that_was_made_smaller_on_its_way_is_refused(gate: CommandGate) -> None:
    spent = Spent(model="m", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(1), steps=900)
    genuine = command(ledger=LedgerHead(entries=3, spent=(spent,)))
    smaller = genuine.replace(b"900", b"100")
    assert smaller != genuine
    with pytest.raises(EnvelopeError, match="not the coordinator's"):
        gate.accept(smaller, now_s=NOW_S)
    with pytest.raises(EnvelopeError, match="expired"):  # an older one, where nothing remembers that it was used
        gate.accept(command(ledger=LedgerHead()), now_s=NOW_S + 60)
    found = gate.accept(genuine, now_s=NOW_S).ledger
    assert found is not None
    assert found.spent == (spent,)


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", b'{"payload": "{}", "signature": "AA=="}', b"[" * 5000])
def test_junk_never_passes(gate: CommandGate, payload: bytes) -> None:
    with pytest.raises((MalformedError, EnvelopeError)):
        gate.accept(payload, now_s=NOW_S)


def test_damaged_sequence_file_stops_commands_instead_of_repeating_one(gate: CommandGate, tmp_path: Path) -> None:
    (tmp_path / "sequence.json").write_bytes(b"{")
    with pytest.raises(StalledError, match=r"sequence\.json"):
        gate.accept(command(), now_s=NOW_S)


def test_without_the_coordinators_key_nothing_passes(gate: CommandGate, tmp_path: Path) -> None:
    elliptic = generate_private_key(SECP256R1()).public_key()
    (tmp_path / "key.pem").write_bytes(elliptic.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(StalledError, match="Ed25519"):
        gate.accept(command(), now_s=NOW_S)
    (tmp_path / "key.pem").write_bytes(b"junk")
    with pytest.raises(StalledError, match=r"key\.pem"):
        gate.accept(command(), now_s=NOW_S)
    (tmp_path / "key.pem").unlink()
    with pytest.raises(StalledError, match="no release offer"):
        gate.accept(command(), now_s=NOW_S)
