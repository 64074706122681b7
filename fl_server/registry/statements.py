"""What stands beside a released version for those who check it without this project's tools.

`bom.cdx.json` says what the version is; `model.sig`, an OpenSSF Model Signing v1.0 bundle, signs all other files of its
folder. That format's keys are on NIST curves, so its key is none of those that sign releases.

Source:
    https://github.com/ossf/model-signing-spec; DSSE, https://github.com/secure-systems-lab/dsse
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fl_server.errors import ServerError
from fl_server.registry.bom import BOM_NAME, build_bom
from fl_server.registry.registry import ModelVersion
from models.contract.encoding import build_canonical, build_digest
from models.contract.files import save_atomically
from models.contract.manifest import MANIFEST_NAME, FileEntry

SIGNATURE_NAME = "model.sig"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"


class StatementKey:
    """Signs bundles: ECDSA on P-256."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.hint = build_digest(self.public_pem)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


def open_statement_key(path: Path, public_path: Path) -> StatementKey:
    """Return the key at `path`, new if there is none; its public part, for those who verify, is in `public_path`.

    Raises:
        ServerError: The file is no such key.
    """
    if not path.exists():
        new = ec.generate_private_key(ec.SECP256R1())
        save_atomically(path, new.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ServerError(f"{path}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ServerError(f"{path} is no key on P-256")
    opened = StatementKey(key)
    if not public_path.exists() or public_path.read_bytes() != opened.public_pem:
        save_atomically(public_path, opened.public_pem)
    return opened


def write_statements(version: ModelVersion, key: StatementKey) -> None:
    """Let both documents be in the version's folder, signed with `key`; made once, and again for a new key."""
    manifest_bytes = version.load_manifest_bytes()
    manifest = version.load_manifest()
    bom_path, signature_path = version.directory / BOM_NAME, version.directory / SIGNATURE_NAME
    entry = FileEntry(digest=build_digest(manifest_bytes), size_bytes=len(manifest_bytes))
    bom = build_bom(manifest, entry, created_at=version.created_at)
    digests = {name: file.digest for name, file in manifest.all_files.items()}
    digests |= {MANIFEST_NAME: entry.digest, BOM_NAME: build_digest(bom)}
    payload = _build_statement(f"{version.model}-{version.version}", digests)
    if _is_signed(signature_path, payload, key):
        return
    save_atomically(bom_path, bom)
    save_atomically(signature_path, _build_bundle(payload, key))


def _is_signed(path: Path, payload: bytes, key: StatementKey) -> bool:
    """Return whether the bundle at `path`, which this module wrote, is of this payload and made with this key."""
    try:
        bundle = path.read_bytes()
    except FileNotFoundError:
        return False
    return _encode(payload).encode() in bundle and key.hint.encode() in bundle


def _build_statement(name: str, digests: Mapping[str, str]) -> bytes:
    files = sorted(digests.items())
    whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in files)).hexdigest()
    return build_canonical(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": name, "digest": {"sha256": whole}}],
            "predicateType": "https://model_signing/signature/v1.0",
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [SIGNATURE_NAME],
                },
                "resources": [{"name": file, "algorithm": "sha256", "digest": digest} for file, digest in files],
            },
        }
    )


def _build_bundle(payload: bytes, key: StatementKey) -> bytes:
    encoded = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    return build_canonical(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": key.hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": _encode(payload),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": _encode(key.sign(encoded)), "keyid": ""}],
            },
        }
    )


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
