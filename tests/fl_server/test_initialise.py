import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_server.config import load_server_settings
from fl_server.directory import Directory
from fl_server.errors import UsageError
from fl_server.initialise import initialise
from fl_server.rollout.repository import ReleaseRepository


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    initialise(tmp_path / "federation", fleet="demo", host="server.example")
    return Directory(tmp_path / "federation")


def test_configuration_that_init_writes_can_be_loaded(directory):
    settings = load_server_settings(directory.config_path)
    assert settings.fleet == "demo"
    assert settings.broker.host == settings.proxy.host == "server.example"


@pytest.mark.parametrize("server", ["superlink", "broker", "proxy"])
def test_servers_certificate_is_the_authoritys_and_names_every_address(directory, server):
    ca = x509.load_pem_x509_certificate(directory.ca_path.read_bytes())
    certificate = x509.load_pem_x509_certificate((directory.ca_dir / f"{server}.pem").read_bytes())
    certificate.verify_directly_issued_by(ca)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "server.example"}
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    key = load_pem_private_key((directory.ca_dir / f"{server}.key.pem").read_bytes(), None)
    assert isinstance(key.curve, ec.SECP256R1)
    assert key.public_key() == certificate.public_key()


def test_broker_listens_where_devices_dial_it_and_only_this_machine_needs_no_more_than_the_loopback(
    tmp_path, directory
):
    assert "listener 8883 \n" in (directory.broker_dir / "mosquitto.conf").read_text()
    initialise(tmp_path / "local", fleet="demo", host="127.0.0.1", broker_port=1234)
    assert "listener 1234 127.0.0.1\n" in (tmp_path / "local" / "broker" / "mosquitto.conf").read_text()
    assert load_server_settings(tmp_path / "local" / "fl-server.toml").broker.port == 1234


def test_nobody_else_reads_a_key_or_secret(directory):
    secrets = [*directory.path.rglob("*.key.pem"), *(directory.path / "keys").rglob("*.pem")]
    secrets.append(directory.superexec_secret_path)
    assert len(secrets) == 15
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_signed_repository_is_there(directory):
    assert "1.root.json" in ReleaseRepository(directory).load_metadata()


def test_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        initialise(tmp_path, fleet="demo", host="127.0.0.1")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("fleet", "host"), [("a/b", "127.0.0.1"), ("demo", 'x"\nport = 1'), ("demo", "")])
def test_names_that_cannot_be_used_leave_nothing_behind(tmp_path, fleet, host):
    with pytest.raises(UsageError):
        initialise(tmp_path / "federation", fleet=fleet, host=host)
    assert list(tmp_path.iterdir()) == []


def test_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("fl_server.initialise.save_secret", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        initialise(tmp_path / "federation", fleet="demo", host="127.0.0.1")
    assert list(tmp_path.iterdir()) == []
