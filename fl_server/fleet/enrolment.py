"""Enrolment: one bundle of files makes a machine a device of this fleet."""

import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from fl_server.authority import Authority, encode, encode_key
from fl_server.errors import UsageError
from fl_server.fleet.roster import Roster, RosterError
from models.contract.bundle import (
    CA_NAME,
    CERT_NAME,
    CONFIG_NAME,
    KEY_NAME,
    NODE_KEY_NAME,
    ROOT_NAME,
    Membership,
    build_config,
    is_free,
    save_bundle,
)
from models.contract.encoding import build_digest, build_json
from models.contract.enrolment import EnrolmentAnswer, EnrolmentRequest, Token, build_token, create_secret
from models.contract.floors import FLOORS_NAME, Floors
from models.contract.topics import check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What every bundle of a fleet says; `renewal` is None where no proxy takes renewals."""

    fleet: str
    broker_host: str
    broker_port: int
    broker_tls: bool
    superlink: str
    ca: bytes
    tuf_root: bytes
    floors: Floors
    renewal: str | None = None

    def describe(self, device_id: str, model: str) -> Membership:
        """Return what one device is told of it."""
        return Membership(
            device_id=device_id,
            fleet=self.fleet,
            model=model,
            broker_host=self.broker_host,
            broker_port=self.broker_port,
            broker_tls=self.broker_tls,
            superlink=self.superlink,
            renewal=self.renewal,
        )


def enroll_device(
    roster: Roster, authority: Authority, federation: Federation, *, device_id: str, model: str, out_dir: Path
) -> None:
    """Enrol a device and write its bundle to `out_dir`; both happen, or neither.

    Raises:
        RosterError: A name is not allowed, or the id is taken.
        AuthorityError: The id is the coordinator's own name.
        UsageError: `out_dir` holds something.
    """
    _check_names(device_id, model)
    if not is_free(out_dir):
        raise UsageError(f"{out_dir} is not an empty folder; a bundle gets one of its own")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue_device(device_id, key.public_key())
    node_key = ec.generate_private_key(ec.SECP384R1())  # the curve that Flower's node authentication asks for
    files = {
        CONFIG_NAME: build_config(federation.describe(device_id, model)),
        ROOT_NAME: federation.tuf_root,
        FLOORS_NAME: build_json(federation.floors),
        CA_NAME: federation.ca,
        CERT_NAME: encode(certificate),
        KEY_NAME: encode_key(key),
        NODE_KEY_NAME: node_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    }
    with roster.enrolling(device_id, _encode_node_key(node_key.public_key())):
        save_certificate(roster, device_id, certificate)
        save_bundle(out_dir, files)


def issue_token(
    roster: Roster, ca: bytes, *, device_id: str, model: str, lifetime_s: float, again: bool = False
) -> str:
    """Return a token with which a machine makes itself the device, once; earlier ones for it are worth nothing more.

    Args:
        roster: Keeps the token's digest.
        ca: The authority's certificate, by which the device recognises the server.
        device_id: Who the machine will be.
        model: What it will serve.
        lifetime_s: Of the token; > 0.
        again: Whether the device is enrolled already: what it spent stays, its present keys end with the new ones.

    Raises:
        RosterError: A name is not allowed; or the id is taken, or is not with `again`.
    """
    _check_names(device_id, model)
    token = Token(
        device_id=device_id,
        expires_at=int(time.time() + lifetime_s),
        ca_digest=build_digest(ca),
        secret=create_secret(),
    )
    text = build_token(token)
    roster.add_token(
        build_digest(text.encode()), device_id=device_id, model=model, expires_at=token.expires_at, again=again
    )
    return text


def enroll_by_token(
    roster: Roster, authority: Authority, federation: Federation, request: EnrolmentRequest
) -> EnrolmentAnswer:
    """Spend the request's token and return what its sender becomes a device with; both happen, or neither.

    Raises:
        RosterError: The token is unknown, spent or expired, or the node's key cannot be used.
        AuthorityError: The certificate cannot be issued.
    """
    node_key = _parse_node_key(request.node_key)
    with roster.redeeming(build_digest(request.token.encode()), node_key) as newcomer:
        certificate = authority.issue_from_request(newcomer.device_id, request.request.encode())
        save_certificate(roster, newcomer.device_id, certificate)
        return EnrolmentAnswer(
            certificate=encode(certificate).decode(),
            tuf_root=federation.tuf_root.decode(),
            floors=federation.floors,
            membership=federation.describe(newcomer.device_id, newcomer.model),
        )


def renew_device(roster: Roster, authority: Authority, device_id: str, request: bytes) -> bytes:
    """Return a new certificate, PEM, of a member that has shown its present one; that one ends by itself.

    Args:
        roster: Keeps the certificate.
        authority: Issues it.
        device_id: Who asks, as its present certificate says.
        request: PKCS #10 in PEM; only its key counts, and it may be the same key again.

    Raises:
        RosterError: No such member: it was revoked, or never enrolled.
        AuthorityError: The request cannot be used.
    """
    certificate = authority.issue_from_request(device_id, request)
    save_certificate(roster, device_id, certificate)
    return encode(certificate)


def save_certificate(roster: Roster, device_id: str, certificate: x509.Certificate) -> None:
    """Keep on the roster what must be refused once the device is revoked; raises RosterError for no member."""
    roster.save_certificate(device_id, certificate.serial_number, certificate.not_valid_after_utc.timestamp())


def _check_names(device_id: str, model: str) -> None:
    try:
        check_name(device_id, "device id")
        check_name(model, "model")
    except ValueError as error:
        raise RosterError(str(error)) from error


def _encode_node_key(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _parse_node_key(text: str) -> bytes:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RosterError("the node's key is no OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise RosterError("the node's key must be on the curve P-384")
    return _encode_node_key(key)
