import datetime as dt
import http.server
import ssl
import threading
from typing import Self

import pytest
from cryptography import x509

from edge_agent.config import load_agent_settings
from edge_agent.errors import AgentError
from edge_agent.renewal import renew
from fl_server import authority as authority_module
from fl_server.authority import Authority
from fl_server.fleet.enrolment import Federation, enroll_device, renew_device
from fl_server.fleet.roster import Roster, RosterError


class Renewals:
    """What answers /v1/renew: who asks is what the client's certificate says; a context."""

    def __init__(self, authority: Authority, database_path) -> None:
        self.issuer, self.asked = authority, 0
        ca_dir, renewals = authority.crl_path.parent, self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                renewals.asked += 1
                (name,) = dict(part[0] for part in self.connection.getpeercert()["subject"]).values()
                request = self.rfile.read(int(self.headers["Content-Length"]))
                status = 200
                try:
                    with Roster(database_path) as roster:
                        answer = renew_device(roster, renewals.issuer, name, request)
                except RosterError as error:
                    status, answer = 403, str(error).encode()
                self.send_response(status if self.path == "/v1/renew" else 404)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(ca_dir / "proxy.pem", ca_dir / "proxy.key.pem")
        context.load_verify_locations(ca_dir / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def authority(tmp_path):
    authority = Authority.create(tmp_path / "ca", fleet="demo")
    authority.issue_servers(["127.0.0.1"])
    return authority


@pytest.fixture
def renewals(authority, tmp_path):
    with Renewals(authority, tmp_path / "coordinator.db") as renewals:
        yield renewals


def enroll(tmp_path, authority, port):
    """Return the settings of a device whose certificate lasts as long as new ones do now."""
    federation = Federation(
        fleet="demo",
        broker_host="127.0.0.1",
        broker_port=1,
        broker_tls=True,
        superlink=f"127.0.0.1:{port}",
        ca=(tmp_path / "ca" / "ca.pem").read_bytes(),
        tuf_root=b"{}",
    )
    with Roster(tmp_path / "coordinator.db") as roster:
        enroll_device(roster, authority, federation, device_id="device-1", model="m", out_dir=tmp_path / "bundle")
    return load_agent_settings(tmp_path / "bundle" / "edge-agent.toml")


@pytest.fixture
def ending(tmp_path, authority, renewals, monkeypatch):
    """The settings of a device whose certificate has a quarter of its life left, backdated by an hour as all are."""
    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "DEVICE_LIFETIME", dt.timedelta(minutes=20))
        return enroll(tmp_path, authority, renewals.port)


def test_certificate_that_lasts_is_left_alone(tmp_path, authority, renewals):
    settings = enroll(tmp_path, authority, renewals.port)
    assert renew(settings) == ""
    assert renewals.asked == 0


def test_certificate_that_ends_soon_is_renewed_for_the_same_key_and_name(tmp_path, ending):
    before = x509.load_pem_x509_certificate(ending.identity.cert_path.read_bytes())
    assert "renewed until" in renew(ending)
    after = x509.load_pem_x509_certificate(ending.identity.cert_path.read_bytes())
    assert (after.subject, after.public_key()) == (before.subject, before.public_key())
    assert after.not_valid_after_utc - before.not_valid_after_utc > dt.timedelta(days=364)
    ending.identity.build_context()
    assert renew(ending) == ""
    with Roster(tmp_path / "coordinator.db") as roster:
        assert after.serial_number in {item.serial for item in roster.list_certificates("device-1")}


def test_revoked_device_keeps_what_it_has(tmp_path, ending):
    before = ending.identity.cert_path.read_bytes()
    with Roster(tmp_path / "coordinator.db") as roster:
        roster.revoke("device-1")
    with pytest.raises(AgentError, match=r"refuses: 403 .*not enrolled"):
        renew(ending)
    assert ending.identity.cert_path.read_bytes() == before


def test_certificate_of_another_authority_is_not_taken(tmp_path, renewals, ending):
    before = ending.identity.cert_path.read_bytes()
    renewals.issuer = Authority.create(tmp_path / "other", fleet="demo")
    with pytest.raises(AgentError, match="another authority"):
        renew(ending)
    assert ending.identity.cert_path.read_bytes() == before


def test_certificate_that_has_ended_needs_the_operator(tmp_path, authority, renewals, monkeypatch):
    monkeypatch.setattr(authority_module, "DEVICE_LIFETIME", dt.timedelta(minutes=-10))
    with pytest.raises(AgentError, match="enrol this device again"):
        renew(enroll(tmp_path, authority, renewals.port))
    assert renewals.asked == 0
