import stat
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from edge_agent.config import load_agent_settings
from edge_agent.updates.told_floors import load_floors
from fl_server.errors import UsageError
from fl_server.fleet.enrolment import Federation, enroll_device
from fl_server.fleet.roster import Roster, RosterError
from models.contract.floors import TOLD_ROLES, Floor, Floors

FLOORS = Floors(
    roles={role: Floor(version=7, keys="d" * 64) for role in TOLD_ROLES}, signed_at=datetime(2026, 11, 24, tzinfo=UTC)
)
FEDERATION = Federation(
    fleet="demo",
    broker_host="10.0.0.1",
    broker_port=1884,
    superlink="10.0.0.1:9093",
    ca=b"ca",
    tuf_root=b"{}",
    floors=FLOORS,
)


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "coordinator.db") as roster:
        yield roster


def test_bundle_is_what_an_agent_reads(roster, tmp_path):
    enroll_device(roster, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    settings = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml")
    assert (settings.device_id, settings.fleet, settings.model) == ("device-1", "demo", "digits")
    assert (settings.broker.host, settings.broker.port) == ("10.0.0.1", 1884)
    assert settings.federation.superlink == "10.0.0.1:9093"
    assert settings.tuf_root_path.read_bytes() == b"{}"
    assert load_floors(settings.tuf_root_path.with_name("floors.json")) == FLOORS
    assert settings.federation.ca_path.read_bytes() == b"ca"
    assert settings.federation.node_key_path == tmp_path / "bundle" / "node.key"


def test_node_key_is_a_private_p384_key_whose_public_half_is_on_the_roster(roster, tmp_path):
    enroll_device(roster, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    path = tmp_path / "bundle" / "node.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key.curve, ec.SECP384R1)
    assert load_ssh_public_key(roster.list_devices()[0].public_key) == key.public_key()


@pytest.mark.parametrize("device_id", ["", "a+b", "#", "a/b", "a\0b", "x" * 10_000, "gerät", "..", "-a", "a b", "a\n"])
def test_id_that_could_not_stand_in_a_topic_is_refused(roster, tmp_path, device_id):
    with pytest.raises(RosterError, match="device id"):
        enroll_device(roster, FEDERATION, device_id=device_id, model="digits", out_dir=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert roster.list_devices() == []


def test_id_taken_leaves_no_second_bundle(roster, tmp_path):
    enroll_device(roster, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "one")
    with pytest.raises(RosterError, match="enrolled already"):
        enroll_device(roster, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_folder_that_holds_something_is_not_written_to(roster, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        enroll_device(roster, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "bundle")
    assert roster.list_devices() == []


def test_bundle_that_cannot_be_written_enrols_nobody(roster, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        enroll_device(roster, FEDERATION, device_id="device-1", model="digits", out_dir=tmp_path / "file" / "bundle")
    assert roster.list_devices() == []
