"""First boot and renewal as a device does them, through the real nginx."""

import dataclasses
import datetime as dt
import json
import subprocess
import sys
from decimal import Decimal
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from edge_agent.config import load_agent_settings
from edge_agent.enrolment import build_request, enroll
from edge_agent.errors import StalledError, TransientError
from edge_agent.renewal import renew
from fl_server.console.http import Request
from fl_server.enrolment_desk import EnrolmentDesk
from fl_server.errors import ServerError
from fl_server.fleet.enrolment import enroll_by_token, issue_token
from fl_server.fleet.roster import Roster, RosterError
from models.contract.encoding import build_json
from models.contract.enrolment import EnrolmentRequest, RenewalRequest, build_token, parse_token
from models.contract.ledger import LedgerHead, Spent
from tests.simulators.nginx import Proxy, issue_old, running_desk
from tests.simulators.waiting import wait_until

NOW = dt.datetime.now(dt.UTC)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    with Proxy.create(tmp_path_factory.mktemp("proxy") / "federation") as proxy, running_desk(proxy):
        yield proxy


@pytest.fixture
def roster(proxy):
    with Roster(proxy.directory.database_path) as roster:
        yield roster


def get_token(proxy: Proxy, roster: Roster, device_id: str, *, lifetime_s=3600.0, again=False) -> str:
    ca = proxy.directory.ca_path.read_bytes()
    return issue_token(roster, ca, device_id=device_id, model="digits", lifetime_s=lifetime_s, again=again)


def get_server(proxy: Proxy) -> str:
    return f"https://127.0.0.1:{proxy.settings.proxy.enrolment_port}"


def ask_for(proxy: Proxy, token: str, out) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_agent", "enroll", "--server", get_server(proxy), "--out", str(out)]
    return subprocess.run([*command, "--token", "-"], input=token, capture_output=True, text=True, check=False)


def build_wish(token: str) -> EnrolmentRequest:
    node_key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return EnrolmentRequest(
        token=token,
        request=build_request("x", ec.generate_private_key(ec.SECP256R1())).decode(),
        node_key=node_key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
    )


def test_machine_becomes_a_device_whose_keys_were_born_on_it(proxy, roster, tmp_path):
    done = ask_for(proxy, get_token(proxy, roster, "device-1"), tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    settings = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml")
    assert (settings.device_id, settings.fleet, settings.model) == ("device-1", "demo", "digits")
    assert settings.federation.superlink == settings.renewal.server == proxy.settings.fleet_address
    assert settings.tuf_root_path.read_bytes() == proxy.federation.tuf_root
    node_key = load_ssh_private_key(settings.federation.node_key_path.read_bytes(), None)
    (device,) = [device for device in roster.list_devices() if device.device_id == "device-1"]
    assert device.public_key == node_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert proxy.ask("/v1/fleet/pull-messages", settings.identity) == 502  # let in; there is no SuperLink here
    assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("bundle/*.key")} == {0}


def test_token_is_worth_something_once_for_its_device_and_for_a_while(proxy, roster, tmp_path):
    used = get_token(proxy, roster, "device-2")
    enroll(get_server(proxy), used, tmp_path / "device-2")
    superseded = get_token(proxy, roster, "device-3")
    valid = get_token(proxy, roster, "device-3")
    refusals = {
        used: "was used already",
        get_token(proxy, roster, "device-4", lifetime_s=-1): "has expired",
        superseded: "is not valid here",
        build_token(dataclasses.replace(parse_token(valid), device_id="device-5")): "is not valid here",
        build_token(dataclasses.replace(parse_token(valid), expires_at=2**40)): "is not valid here",
        valid[:-8]: "is no enrolment token",
    }
    for token, reason in refusals.items():
        done = ask_for(proxy, token, tmp_path / "refused")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert reason in done.stderr
    assert not list(tmp_path.glob("*refused*"))
    with pytest.raises(RosterError, match="enrolled already"):
        get_token(proxy, roster, "device-2")
    with pytest.raises(RosterError, match="never enrolled"):
        get_token(proxy, roster, "device-5", again=True)
    enroll(get_server(proxy), valid, tmp_path / "device-3")  # what was refused has spent nothing


def test_token_does_not_leave_for_a_server_of_another_authority(proxy, roster, tmp_path):
    other = Proxy.create(tmp_path / "other")
    with Roster(other.directory.database_path) as others:
        token = get_token(other, others, "device-1")
    with pytest.raises(StalledError, match="its authority is another"):
        enroll(get_server(proxy), token, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_answer_that_was_lost_costs_a_token_and_the_device_keeps_what_it_spent(proxy, roster, tmp_path):
    token = get_token(proxy, roster, "device-6")
    answer = enroll_by_token(roster, proxy.authority, proxy.federation, build_wish(token))  # nobody hears it
    spent = LedgerHead(
        entries=1, spent=(Spent(model="digits", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(1), steps=7),)
    )
    roster.save_ledger("device-6", spent, run="run-1", round_number=1)
    with pytest.raises(StalledError, match="used already"):
        enroll(get_server(proxy), token, tmp_path / "bundle")
    enroll(get_server(proxy), get_token(proxy, roster, "device-6", again=True), tmp_path / "bundle")
    assert roster.get_ledger("device-6").spent == spent.spent
    lost = x509.load_pem_x509_certificate(answer.certificate.encode()).serial_number
    now = x509.load_pem_x509_certificate((tmp_path / "bundle" / "device.pem").read_bytes()).serial_number
    revoked = {certificate.serial for certificate in roster.list_revoked_certificates()}
    assert lost in revoked
    assert now not in revoked


def test_failure_before_the_certificate_leaves_the_token_unspent(proxy, roster, tmp_path):
    token = get_token(proxy, roster, "device-7")
    wish = dataclasses.replace(build_wish(token), request="no request")
    with pytest.raises(ServerError, match="signing request"):
        enroll_by_token(roster, proxy.authority, proxy.federation, wish)
    assert enroll(get_server(proxy), token, tmp_path / "bundle") == "device-7"


def test_revoked_device_comes_back_with_a_token_of_the_operator_and_with_other_keys(proxy, roster, tmp_path):
    enroll(get_server(proxy), get_token(proxy, roster, "device-8"), tmp_path / "first")
    stolen = get_token(proxy, roster, "device-8", again=True)
    roster.revoke("device-8")
    with pytest.raises(StalledError):
        enroll(get_server(proxy), stolen, tmp_path / "thief")
    enroll(get_server(proxy), get_token(proxy, roster, "device-8", again=True), tmp_path / "second")
    assert roster.is_member("device-8")
    (first,) = (item.serial for item in roster.list_revoked_certificates() if item.device_id == "device-8")
    roster.save_shut_out([first])
    assert [item.serial for item in roster.list_certificates("device-8") if item.is_shut_out] == [first]


def test_certificate_is_renewed_by_the_device_when_most_of_its_time_is_over(proxy, roster, tmp_path):
    enroll(get_server(proxy), get_token(proxy, roster, "device-9"), tmp_path / "bundle")
    settings = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml")
    assert renew(settings.renewal.server, settings.identity, now=NOW) is None
    with pytest.raises(StalledError, match="not half over"):
        renew(settings.renewal.server, settings.identity, now=NOW + dt.timedelta(days=300))
    old = issue_old(proxy, settings.identity, days_left=30)
    with pytest.raises(StalledError, match="no such certificate"):  # none that the roster knows
        renew(settings.renewal.server, settings.identity, now=NOW)
    roster.save_certificate("device-9", old.serial_number, old.not_valid_after_utc.timestamp())
    identity = settings.identity
    paths = [str(path) for path in (identity.ca_path, identity.cert_path, identity.key_path)]
    command = [sys.executable, "-m", "edge_agent.renewal", settings.renewal.server, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    renewed = x509.load_pem_x509_certificate(identity.cert_path.read_bytes())
    assert renewed.not_valid_after_utc > NOW + dt.timedelta(days=360)
    assert renewed.public_key() == old.public_key()
    assert proxy.ask("/v1/fleet/pull-messages", identity) == 502
    roster.revoke("device-9")
    issue_old(proxy, identity, days_left=30)
    with pytest.raises(StalledError, match="no such certificate"):
        renew(settings.renewal.server, identity, now=NOW)


def test_certificate_alone_renews_nothing(proxy, roster, tmp_path):
    enroll(get_server(proxy), get_token(proxy, roster, "device-10"), tmp_path / "bundle")
    identity = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml").identity
    old = issue_old(proxy, identity, days_left=30)
    roster.save_certificate("device-10", old.serial_number, old.not_valid_after_utc.timestamp())
    mine = RenewalRequest(request=build_request("device-10", ec.generate_private_key(ec.SECP256R1())).decode())
    headers = {"x-device-certificate": quote(identity.cert_path.read_text())}
    desk = EnrolmentDesk(roster, proxy.authority, lambda: proxy.federation)
    answer = desk.decide(Request(method="POST", path="/v1/renew", headers=headers, body=build_json(mine)))
    assert answer.status == 403
    assert "signed with the key of the present" in json.loads(answer.body)["error"]
    nobody = desk.decide(Request(method="POST", path="/v1/renew", headers={}, body=build_json(mine)))
    assert nobody.status == 403


def test_flood_of_newcomers_is_slowed_down_at_the_proxy(proxy):
    port = proxy.settings.proxy.enrolment_port
    wait_until(lambda: proxy.ask("/v1/enroll", None, port=port) == 429, "the limit", timeout_s=30)


def test_server_that_is_away_is_told_apart_from_one_that_refuses(proxy, roster, tmp_path):
    token = get_token(proxy, roster, "device-11")
    with pytest.raises(TransientError, match="does not answer"):
        enroll("127.0.0.1:1", token, tmp_path / "bundle")
