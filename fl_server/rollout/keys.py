"""Signing keys on disk: Ed25519 in PKCS8 PEM files that only their owner reads."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fl_server.errors import OfflineKeyError, ServerError
from models.contract.files import save_atomically


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
