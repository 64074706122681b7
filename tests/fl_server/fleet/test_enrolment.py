import stat
import time
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import NameOID

from edge_agent.config import load_agent_settings
from edge_agent.updates.told_floors import load_floors
from fl_server.authority import Authority, AuthorityError
from fl_server.errors import UsageError
from fl_server.fleet.enrolment import Federation, enroll_device, renew_device
from fl_server.fleet.roster import Roster, RosterError
from models.contract.floors import TOLD_ROLES, Floor, Floors

FLOORS = Floors(
    roles={role: Floor(version=7, keys="d" * 64) for role in TOLD_ROLES}, signed_at=datetime(2026, 11, 24, tzinfo=UTC)
)
FEDERATION = Federation(
    fleet="demo",
    broker_host="10.0.0.1",
    broker_port=1884,
    broker_tls=True,
    superlink="10.0.0.1:9093",
    ca=b"ca",
    tuf_root=b"{}",
    floors=FLOORS,
)


def build_request(key: ec.EllipticCurvePrivateKey, common_name: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(constraints, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "ca", fleet="demo")


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "coordinator.db") as roster:
        yield roster


def test_bundle_is_what_an_agent_reads(roster, authority, tmp_path):
    enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    settings = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml")
    assert (settings.device_id, settings.fleet, settings.model) == ("device-1", "demo", "digits")
    assert (settings.broker.host, settings.broker.port) == ("10.0.0.1", 1884)
    assert settings.federation.superlink == "10.0.0.1:9093"
    assert settings.tuf_root_path.read_bytes() == b"{}"
    assert load_floors(settings.tuf_root_path.with_name("floors.json")) == FLOORS
    assert settings.superlink_ca_path.read_bytes() == settings.broker_identity.ca_path.read_bytes() == b"ca"
    assert settings.federation.node_key_path == tmp_path / "bundle" / "node.key"


def test_node_key_is_a_private_p384_key_whose_public_half_is_on_the_roster(roster, authority, tmp_path):
    enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    path = tmp_path / "bundle" / "node.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key.curve, ec.SECP384R1)
    assert load_ssh_public_key(roster.list_devices()[0].public_key) == key.public_key()


def test_certificate_names_the_device_and_ends_within_a_year(roster, authority, tmp_path):
    enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    identity = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml").broker_identity
    certificate = x509.load_pem_x509_certificate(identity.cert_path.read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=device-1"
    assert load_pem_private_key(identity.key_path.read_bytes(), None).public_key() == certificate.public_key()
    assert stat.S_IMODE(identity.key_path.stat().st_mode) == 0o600
    (kept,) = roster.list_certificates("device-1")
    assert (kept.serial, kept.is_shut_out) == (certificate.serial_number, False)
    assert kept.not_after == certificate.not_valid_after_utc.timestamp() < time.time() + 366 * 86_400


def test_renewal_takes_nothing_but_the_key_from_the_request(roster, authority, tmp_path):
    enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    key = ec.generate_private_key(ec.SECP256R1())
    renewed = x509.load_pem_x509_certificate(
        renew_device(roster, authority, "device-1", build_request(key, "device-2"))
    )
    assert renewed.subject.rfc4514_string() == "CN=device-1"
    assert renewed.public_key() == key.public_key()
    assert not renewed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert renewed.serial_number in {kept.serial for kept in roster.list_certificates("device-1")}


def test_revoked_device_gets_no_certificate_and_all_that_it_has_are_listed(roster, authority, tmp_path):
    enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    request = build_request(ec.generate_private_key(ec.SECP256R1()), "device-1")
    renew_device(roster, authority, "device-1", request)
    roster.revoke("device-1")
    with pytest.raises(RosterError, match="not enrolled"):
        renew_device(roster, authority, "device-1", request)
    assert len(roster.list_revoked_certificates()) == 2


@pytest.mark.parametrize(
    "request_pem",
    [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "P384", "tampered"],
)
def test_request_that_is_none_is_refused(authority, request_pem):
    if request_pem == "P384":
        request_pem = build_request(ec.generate_private_key(ec.SECP384R1()), "device-1")
    elif request_pem == "tampered":
        request = x509.load_pem_x509_csr(build_request(ec.generate_private_key(ec.SECP256R1()), "device-1"))
        der = request.public_bytes(Encoding.DER).replace(b"device-1", b"device-2")
        request_pem = x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)
    with pytest.raises(AuthorityError, match="request"):
        authority.issue_from_request("device-1", request_pem)


def test_coordinators_own_name_is_no_device(roster, authority, tmp_path):
    for device_id in ("coordinator", "Coordinator"):
        with pytest.raises(AuthorityError, match="own name"):
            enroll_device(
                roster, authority, FEDERATION, device_id=device_id, model="digits", out_dir=tmp_path / "bundle"
            )
    assert roster.list_devices() == []


@pytest.mark.parametrize("device_id", ["", "a+b", "#", "a/b", "a\0b", "x" * 10_000, "gerät", "..", "-a", "a b", "a\n"])
def test_id_that_could_not_stand_in_a_topic_is_refused(roster, authority, tmp_path, device_id):
    with pytest.raises(RosterError, match="device id"):
        enroll_device(roster, authority, FEDERATION, device_id=device_id, model="digits", out_dir=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert roster.list_devices() == []


def test_id_taken_leaves_no_second_bundle(roster, authority, tmp_path):
    enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "one")
    with pytest.raises(RosterError, match="enrolled already"):
        enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_folder_that_holds_something_is_not_written_to(roster, authority, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        enroll_device(roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    assert roster.list_devices() == []


def test_bundle_that_cannot_be_written_enrols_nobody(roster, authority, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        enroll_device(
            roster, authority, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "file" / "bundle"
        )
    assert roster.list_devices() == []
