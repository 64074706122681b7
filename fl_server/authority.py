"""The federation's certificate authority, and every certificate that it issues.

ca/ca.pem, ca.key.pem                          the authority
ca/superlink.pem, broker.pem, proxy.pem        servers, valid for the hosts that devices dial; NAME.key.pem beside each
ca/coordinator.pem                             the coordinator, as a client of the broker
ca/crl.pem                                     the certificates that nobody takes any more

A device's certificate has its id as common name: that is who it is to broker and proxy.
"""

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_server.errors import ServerError
from models.contract.files import save_atomically

LIFETIME = dt.timedelta(days=3650)  # of the authority and of what stays on the coordinator's machine
DEVICE_LIFETIME = dt.timedelta(days=365)
CRL_LIFETIME = dt.timedelta(days=30)  # a broker with an older list lets nobody in
SERVERS = ("superlink", "broker", "proxy")
COORDINATOR = "coordinator"  # the common name of the coordinator's certificate, which no device may have
_BACKDATED = dt.timedelta(hours=1)  # a device's clock may be behind


class AuthorityError(ServerError):
    """The authority cannot be used, or refuses to issue this."""


class Authority:
    """Issues certificates and the list of those revoked; holds the authority's key."""

    def __init__(self, directory: Path) -> None:
        """Open the authority in `directory`, the federation's `ca/`.

        Raises:
            AuthorityError: What is there is not a certificate and its EC key.
        """
        self._directory = directory
        self._certificates, self._key = _load(directory / "ca.pem", directory / "ca.key.pem")

    @property
    def crl_path(self) -> Path:
        return self._directory / "crl.pem"

    def issue_device(self, device_id: str, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Return a client certificate of the device for `key`.

        Raises:
            AuthorityError: The id is the coordinator's own name.
        """
        if device_id.lower() == COORDINATOR:
            raise AuthorityError(f"device id {device_id!r} is the coordinator's own name; choose another")
        return self._issue_client(device_id, key, DEVICE_LIFETIME)

    def issue_from_request(self, device_id: str, request: bytes) -> x509.Certificate:
        """Return a client certificate of the device for the key that signed `request`, a PKCS #10 in PEM.

        Nothing but the key is taken from the request: what it says of its subject is nobody's word.

        Raises:
            AuthorityError: It is no request, its signature is wrong, or its key is not on P-256.
        """
        try:
            parsed = x509.load_pem_x509_csr(request)
            key, is_signed = parsed.public_key(), parsed.is_signature_valid
        except Exception as error:  # what a stranger sent; the library raises its own, ValueError, TypeError and others
            raise AuthorityError("the request is no certificate signing request in PEM") from error
        if not is_signed or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise AuthorityError("the request must be signed with its own key, on the curve P-256")
        return self.issue_device(device_id, key)

    def check_device(self, certificate: bytes) -> x509.Certificate:
        """Return the device's certificate, PEM, if it is of this authority and holds now; whether revoked is not known.

        Raises:
            AuthorityError: It is none, or expired.
        """
        try:
            parsed = x509.load_pem_x509_certificate(certificate)
            parsed.verify_directly_issued_by(self._certificates[0])
        except Exception as error:  # what a stranger sent; the library raises its own, ValueError, TypeError and others
            raise AuthorityError("there is no certificate of this authority") from error
        if not parsed.not_valid_before_utc <= dt.datetime.now(dt.UTC) <= parsed.not_valid_after_utc:
            raise AuthorityError("the certificate has expired; ask the operator for a token made with --again")
        return parsed

    @staticmethod
    def is_young(certificate: x509.Certificate) -> bool:
        """Return whether more than half of its time is left."""
        now, ends = dt.datetime.now(dt.UTC), certificate.not_valid_after_utc
        return ends - now > (ends - certificate.not_valid_before_utc) / 2

    def issue_servers(self, hosts: Sequence[str]) -> None:
        """Write the servers' certificates, valid for `hosts`, and the coordinator's, each with a new key."""
        for name in SERVERS:
            key = ec.generate_private_key(ec.SECP256R1())
            names = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
            builder = self._build_leaf(name, key.public_key(), LIFETIME, ExtendedKeyUsageOID.SERVER_AUTH)
            self._save(name, self._sign(builder.add_extension(names, critical=False)), key)
        key = ec.generate_private_key(ec.SECP256R1())
        self._save(COORDINATOR, self._issue_client(COORDINATOR, key.public_key(), LIFETIME), key)

    def save_crl(self, serials: Iterable[int]) -> None:
        """Replace the list of revoked certificates by `serials`, signed for the next 30 days."""
        now = dt.datetime.now(dt.UTC)
        # OpenSSL prefers the later of two lists that it holds, to the second, and never one of the future.
        issued = now - _BACKDATED
        if self.crl_path.exists():
            issued = max(issued, self._load_crl().last_update_utc + dt.timedelta(seconds=1))
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificates[0].subject)
            .last_update(issued)
            .next_update(now + CRL_LIFETIME)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(issued.timestamp())), critical=False)
        )
        for serial in sorted(serials):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued).build()
            builder = builder.add_revoked_certificate(entry)
        save_atomically(self.crl_path, builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def is_crl_current(self, serials: Iterable[int]) -> bool:
        """Return whether the list on disk names exactly `serials`, and has more than half of its time left."""
        if not self.crl_path.exists():
            return False
        crl = self._load_crl()
        left = (crl.next_update_utc or crl.last_update_utc) - dt.datetime.now(dt.UTC)
        return left > CRL_LIFETIME / 2 and {entry.serial_number for entry in crl} == set(serials)

    def issue_farewell(self, device_id: str) -> tuple[bytes, bytes]:
        """Return certificate and key, PEM, with which the coordinator takes over the session of a revoked device."""
        key = ec.generate_private_key(ec.SECP256R1())
        return encode(self._issue_client(device_id, key.public_key(), dt.timedelta(hours=1))), encode_key(key)

    def _load_crl(self) -> x509.CertificateRevocationList:
        try:
            return x509.load_pem_x509_crl(self.crl_path.read_bytes())
        except ValueError as error:
            raise AuthorityError(f"{self.crl_path} is no list of revoked certificates: {error}") from error

    def _issue_client(
        self, common_name: str, key: ec.EllipticCurvePublicKey, lifetime: dt.timedelta
    ) -> x509.Certificate:
        return self._sign(self._build_leaf(common_name, key, lifetime, ExtendedKeyUsageOID.CLIENT_AUTH))

    def _build_leaf(
        self, common_name: str, key: ec.EllipticCurvePublicKey, lifetime: dt.timedelta, use: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        ends = self._certificates[0].not_valid_after_utc
        return (
            _builder(_name(common_name), self._certificates[0].subject, key, lifetime, no_later_than=ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self._key, hashes.SHA256())

    def _save(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        (self._directory / f"{name}.pem").write_bytes(encode(certificate))
        save_secret(self._directory / f"{name}.key.pem", encode_key(key))

    @classmethod
    def create(cls, directory: Path, *, fleet: str) -> Self:
        """Make a new authority in `directory`, which must not exist."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"edge-fl {fleet} authority")
        certificate = (
            _builder(name, name, key.public_key(), LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        directory.mkdir(mode=0o700)
        (directory / "ca.pem").write_bytes(encode(certificate))
        save_secret(directory / "ca.key.pem", encode_key(key))
        return cls(directory)


def encode(certificate: x509.Certificate) -> bytes:
    """Return it as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return it as PEM, readable by whoever has it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def save_secret(path: Path, data: bytes) -> None:
    """Write `data` to the new file `path`, for its owner's eyes only."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _load(certificate_path: Path, key_path: Path) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
    try:
        certificates = x509.load_pem_x509_certificates(certificate_path.read_bytes())
        key = load_pem_private_key(key_path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"{certificate_path} and {key_path} are no authority: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificates[0].public_key() != key.public_key():
        raise AuthorityError(f"{key_path} is not the EC key of {certificate_path}")
    return certificates, key


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lifetime: dt.timedelta,
    *,
    no_later_than: dt.datetime | None = None,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    ends = now + lifetime
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(min(ends, no_later_than or ends))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
