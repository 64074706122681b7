r"""Parameters that never leave this device: what the newest round began with here, and what it made of them.

    TRAINING_DIR/local/MODEL.sealed    nonce | sealed: run round \n | before | after

A round that is trained once more, because its update was lost, begins with what it began with the first time. Values
of another architecture, or sealed with a key that is gone, do not open: the version's own are where training begins
then. So they are for a run of another privacy unit: values that were learnt without noise on them would be in what a run
of unit `sample` shares. What the owner forgets takes the folder along, and a round that is under way has nowhere to keep what it learnt.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_agent.errors import StalledError, TransientError
from models.contract.encoding import build_canonical, build_digest
from models.contract.files import save_atomically, sync_directory
from models.contract.manifest import LOCAL_NAME, ModelManifest
from models.contract.privacy import Unit
from models.tensors.layout import Vector, build_vector_bytes, parse_vector_bytes

_log = logging.getLogger(__name__)

DIRECTORY_NAME = "local"
_FORGOTTEN_NAME = ".local.forgotten"
_NONCE_BYTES = 12


class Cipher(Protocol):
    """AES-256-GCM under the key of this device's samples, as the samples' own cipher is."""

    def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        """Return what was encrypted; raises if that is not what `data` holds."""
        ...


class LocalParameters:
    """Of one version's model; a model that is the same everywhere has none, and no file.

    Attributes:
        is_local: Which of all parameters they are, shape (n,), bool.
    """

    def __init__(self, training_dir: Path, manifest: ModelManifest, initial: Vector, cipher: Cipher) -> None:
        """Prepare; nothing is opened.

        Args:
            training_dir: Where they are kept, in a folder of their own.
            manifest: Of the version that is trained.
            initial: What they begin with, as `load_initial` returns it.
            cipher: Seals them.
        """
        contract = manifest.training
        assert contract is not None
        self.is_local = contract.layout.mark(contract.local)
        self._directory, self._initial, self._cipher = training_dir / DIRECTORY_NAME, initial, cipher
        self._path = self._directory / f"{manifest.model}.sealed"
        kind = build_canonical({"model": manifest.model, "step": manifest.step_digest, "local": list(contract.local)})
        self._associated = b"edge-fl local parameters 1\0" + build_digest(kind).encode()

    def begin(self, run: str, number: int, unit: Unit) -> Vector:
        """Return what round `number` of `run`, of `unit`, begins with; to be called before a sample is read.

        Raises:
            StalledError: The disk fails.
        """
        if not self._initial.size:
            return self._initial
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sealed = self._path.read_bytes()
        except FileNotFoundError:
            return self._initial
        except OSError as error:
            raise StalledError(f"{self._path}: {error.strerror}") from error
        opened = self._open(sealed, unit)
        if opened is None:
            _log.warning("%s is of another architecture, unit or key: local parameters begin anew", self._path)
            return self._initial
        round_name, before, after = opened
        return before if round_name == _name_round(run, number) else after

    def join(self, shared: Vector, begun: Vector) -> Vector:
        """Return all parameters in the order of the layout, of those that came and those that `begin` returned."""
        if not begun.size:
            return shared
        whole = np.empty(self.is_local.size, np.float32)
        whole[self.is_local], whole[~self.is_local] = begun, shared
        return whole

    def keep(self, run: str, number: int, unit: Unit, *, begun: Vector, moved: Vector) -> Vector:
        """Keep what round `number` of `run` made of what it began with; durable on return, unless it was forgotten.

        Args:
            run: Of the round.
            number: Of the round.
            unit: Whose privacy the run protects.
            begun: As `begin` returned it.
            moved: Of all parameters, shape (n,).

        Returns:
            How those moved that leave the device.

        Raises:
            StalledError: The disk fails.
        """
        if not begun.size:
            return moved
        after = begun + moved[self.is_local]
        data = b"\n".join((_name_round(run, number), build_vector_bytes(begun) + build_vector_bytes(after)))
        nonce = os.urandom(_NONCE_BYTES)
        try:
            save_atomically(self._path, nonce + self._cipher.encrypt(nonce, data, self._associate(unit)), mode=0o600)
        except FileNotFoundError:
            _log.warning("samples were forgotten in round %d: what it made of local parameters is, too", number)
        except OSError as error:
            raise StalledError(f"{self._path}: {error.strerror}") from error
        return moved[~self.is_local]

    def _associate(self, unit: Unit) -> bytes:
        return self._associated + f" {unit}".encode()

    def _open(self, sealed: bytes, unit: Unit) -> tuple[bytes, Vector, Vector] | None:
        try:
            data = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._associate(unit))
        except Exception:  # noqa: BLE001 - each cipher has its own; a nonce cut short is a ValueError
            return None
        round_name, _, values = data.partition(b"\n")
        before, after = np.split(parse_vector_bytes(values), 2)
        return round_name, before, after


def load_initial(graph_dir: Path, manifest: ModelManifest) -> Vector:
    """Return what the version in `graph_dir` begins its local parameters with, which may be none.

    Raises:
        StalledError: Its file is missing, or another than `manifest` names.
    """
    contract = manifest.training
    if contract is None or not contract.local:
        return np.zeros(0, np.float32)
    path = graph_dir / LOCAL_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror}") from error
    if (
        build_digest(data) != manifest.files[LOCAL_NAME].digest
        or len(data) != 4 * contract.layout.select(contract.local).size
    ):
        raise StalledError(f"{path} is not the file that the manifest names")
    return parse_vector_bytes(data)


def forget_local(training_dir: Path) -> None:
    """Remove all local parameters, which may tell of a sample; raises TransientError."""
    directory, forgotten = training_dir / DIRECTORY_NAME, training_dir / _FORGOTTEN_NAME
    try:
        if forgotten.exists():  # of a call that was killed
            shutil.rmtree(forgotten)
        if directory.exists():
            directory.rename(forgotten)  # at once: what a round under way is writing goes along
            shutil.rmtree(forgotten)
            sync_directory(training_dir)
    except OSError as error:
        raise TransientError(f"{directory}: local parameters cannot be removed: {error.strerror}") from error


def _name_round(run: str, number: int) -> bytes:
    return f"{run} {number}".encode()
