"""Which commands of the coordinator may be acted on: genuine, fresh, and each once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from edge_agent.errors import StalledError
from models.contract.encoding import build_json, parse_json
from models.contract.envelope import WakeCommand, open_envelope
from models.contract.errors import EnvelopeError, MalformedError
from models.contract.files import save_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class _Acted:
    schema_version: Literal[1] = 1
    sequence: int


class CommandGate:
    """Lets a command through once; what it let through is on disk first, so that a crash cannot repeat it."""

    def __init__(self, sequence_path: Path, *, key_path: Path, fleet: str, device_id: str) -> None:
        self._sequence_path = sequence_path
        self._key_path = key_path
        self._fleet = fleet
        self._device_id = device_id

    def accept(self, payload: bytes, *, now_s: float) -> WakeCommand:
        """Return the command in `payload`, to be acted on now.

        Raises:
            MalformedError: It is no command.
            EnvelopeError: It is not the coordinator's, not for this device, expired, or was acted on before.
            StalledError: There is no coordinator key yet, or what was acted on cannot be read or written.
        """
        command = open_envelope(
            payload,
            WakeCommand,
            key=self._load_key(),
            fleet=self._fleet,
            audience=self._device_id,
            now_s=now_s,
        )
        last = self._load_sequence()
        if command.sequence <= last:
            raise EnvelopeError(f"command {command.sequence} comes after command {last} was acted on")
        try:
            save_atomically(self._sequence_path, build_json(_Acted(sequence=command.sequence)))
        except OSError as error:
            raise StalledError(f"{self._sequence_path}: {error.strerror or error}") from error
        return command

    def _load_key(self) -> Ed25519PublicKey:
        try:
            key = load_pem_public_key(self._key_path.read_bytes())
        except FileNotFoundError as error:
            raise StalledError("no release offer has brought the coordinator's key yet") from error
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise StalledError(f"{self._key_path}: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise StalledError(f"{self._key_path}: expected an Ed25519 key, got {type(key).__name__}")
        return key

    def _load_sequence(self) -> int:
        try:
            return parse_json(self._sequence_path.read_bytes(), _Acted).sequence
        except FileNotFoundError:
            return -1
        except (OSError, MalformedError) as error:
            raise StalledError(f"{self._sequence_path}: {error}") from error
