"""Signing keys: Ed25519 in PKCS8 PEM files that only their owner reads, or a signer elsewhere (a token, a key service).

A file is known by the key in it, not by its name, so that keys may lie in any folder, on a stick as well.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from fl_server.errors import OfflineKeyError, ServerError, UsageError
from models.contract.encoding import build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically, sync_directory

KEYID_SHOWN = 12  # characters of a key id that tell it from all others of a fleet
_SIGNER_MAX_BYTES = 4096


def create_key(path: Path) -> Ed25519PrivateKey:
    """Return a new key, saved at `path` with mode 0600."""
    key = Ed25519PrivateKey.generate()
    save_atomically(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the key at `path`.

    Raises:
        OfflineKeyError: It is not on this machine.
        ServerError: The file is no Ed25519 key.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise OfflineKeyError(f"{path} is not on this machine: run this where the key is kept") from error
    except (OSError, ValueError, TypeError) as error:
        raise ServerError(f"{path}: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ServerError(f"{path} is no Ed25519 key")
    return key


def build_public_pem(key: Ed25519PublicKey) -> bytes:
    """Return `key` as SubjectPublicKeyInfo PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalSigner:
    """Where a private key is that no file here holds.

    Attributes:
        keyid: Of its public key, which the metadata holds.
        uri: As securesystemslib names signers: "gcpkms:…", "awskms:…", "azurekms:…", "hv:…", "file2:PATH".
    """

    keyid: str
    uri: str


class KeyRing:
    """What can sign on this machine: the key files and signer files of some folders, found by key id."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders

    def find_signers(self, keys: Iterable[Key]) -> tuple[list[Signer], list[str]]:
        """Return the signers of those of `keys` whose private part is within reach, and why an external one is not.

        Raises:
            ServerError: A file in one of the folders is no key.
        """
        files, external = self._list_files(), self._list_external()
        signers, failures = list[Signer](), list[str]()
        for key in keys:
            if key.keyid in files:
                signers.append(CryptoSigner(load_key(files[key.keyid])))
            elif key.keyid in external:
                try:
                    signers.append(_open_external(external[key.keyid][1], key))
                except OfflineKeyError as error:
                    failures.append(str(error))
        return signers, failures

    def find_place(self, keyid: str) -> str | None:
        """Return where the private part of a key is, as a person would write it; None if not within reach."""
        external = self._list_external()
        if keyid in external:
            return external[keyid][1]
        path = self._list_files().get(keyid)
        return None if path is None else str(path)

    def forget(self, keyids: Iterable[str], folder: Path) -> None:
        """Remove the files in `folder` of keys that sign nothing any more."""
        paths = self._list_files() | {keyid: path for keyid, (path, _) in self._list_external().items()}
        for keyid in keyids:
            if keyid in paths and paths[keyid].parent == folder:
                paths[keyid].unlink()

    def _list_files(self) -> dict[str, Path]:
        paths = (path for folder in self._folders for path in sorted(folder.glob("*.pem")))
        return {_get_keyid(load_key(path)): path for path in paths}

    def _list_external(self) -> dict[str, tuple[Path, str]]:
        found = {}
        for path in (path for folder in self._folders for path in sorted(folder.glob("*.signer"))):
            try:
                signer = parse_json(path.read_bytes(), ExternalSigner, max_bytes=_SIGNER_MAX_BYTES)
            except (OSError, ContractError) as error:
                raise ServerError(f"{path}: {error}") from error
            found[signer.keyid] = (path, signer.uri)
        return found


def create_role_key(folder: Path, role: str) -> tuple[Key, Path]:
    """Return the public part of a new key for `role`, and the file in `folder` that it was saved to."""
    staged_path = folder / f".{role}.new"
    key = create_key(staged_path)
    public = CryptoSigner(key).public_key
    path = folder / f"{role}-{public.keyid[:KEYID_SHOWN]}.pem"
    staged_path.replace(path)
    sync_directory(folder)
    return public, path


def save_external(
    folder: Path, role: str, *, uri: str, public_key_path: Path, known: Collection[str]
) -> tuple[Key, Path]:
    """Return the public key in a PEM file, and the new file in `folder` that says which signer has its private part.

    Raises:
        UsageError: It is one of the keys whose ids are `known`, those of the role.
        ServerError: There is no such signer, or it does not sign for that key.
    """
    try:
        public = SSlibKey.from_crypto(load_pem_public_key(public_key_path.read_bytes()))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ServerError(f"{public_key_path}: {error}") from error
    if public.keyid in known:
        raise UsageError(f"{public_key_path}: this key signs {role} already")
    signer = _open_external(uri, public)
    try:
        public.verify_signature(signer.sign(b"test"), b"test")
    except Exception as error:  # every kind of signer has errors of its own
        raise ServerError(f"{public_key_path}, {uri}: {error}") from error
    path = folder / f"{role}-{public.keyid[:KEYID_SHOWN]}.signer"
    save_atomically(path, build_json(ExternalSigner(keyid=public.keyid, uri=uri)), mode=0o600)
    return public, path


def _open_external(uri: str, key: Key) -> Signer:
    try:
        return Signer.from_priv_key_uri(uri, key)
    except Exception as error:  # every kind of signer has errors of its own
        raise OfflineKeyError(f"signer {uri}: {error}") from error


def _get_keyid(key: Ed25519PrivateKey) -> str:
    return CryptoSigner(key).public_key.keyid
