import asyncio
import logging
import os
import socket
import ssl
import time
from pathlib import Path

import pytest

from edge_agent.link.mqtt import Broker, Link, Publication
from fl_server.config import BrokerSettings
from fl_server.fleet import lockout as lockout_module
from fl_server.fleet.enrolment import Federation, enroll_device
from fl_server.fleet.lockout import Lockout
from fl_server.fleet.roster import Roster
from models.contract.identity import Identity
from tests.simulators.mosquitto import ClosedMosquitto
from tests.simulators.waiting import wait_until

CONNECT = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01x"  # MQTT 3.1.1, as "x"
ACCEPTED = b"\x20\x02\x00\x00"


@pytest.fixture
def broker(tmp_path):
    (tmp_path / "federation").mkdir()
    with ClosedMosquitto(tmp_path / "federation") as broker:
        yield broker


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "coordinator.db") as roster:
        yield roster


def enroll(broker: ClosedMosquitto, roster: Roster, directory: Path) -> Identity:
    federation = Federation(
        fleet=broker.fleet,
        broker_host="127.0.0.1",
        broker_port=broker.port,
        broker_tls=True,
        superlink="127.0.0.1:1",
        ca=(broker.ca_dir / "ca.pem").read_bytes(),
        tuf_root=b"{}",
    )
    enroll_device(roster, broker.authority, federation, device_id=directory.name, model="digits", out_dir=directory)
    return Identity(ca_path=directory / "ca.pem", cert_path=directory / "device.pem", key_path=directory / "device.key")


def build_lockout(broker: ClosedMosquitto, roster: Roster) -> Lockout:
    settings = BrokerSettings(port=broker.port, revocation_interval_s=0.05)
    ca_path = broker.ca_dir / "ca.pem"
    return Lockout(settings, roster, broker.authority, servers=[broker.pid_path], ca_path=ca_path)


def build_link(broker: ClosedMosquitto, identity: Identity) -> Link:
    return Link(
        Broker(
            host="127.0.0.1",
            port=broker.port,
            client_id=identity.cert_path.parent.name,
            keepalive_s=5,
            identity=identity,
        ),
        build_will=lambda: Publication(topic="gone", payload=b""),
        on_message=lambda *_: None,
        on_connected=lambda: None,
    )


async def until(condition, what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


def dial(broker: ClosedMosquitto, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
    connection = socket.create_connection(("127.0.0.1", broker.port), timeout=20)
    return context.wrap_socket(connection, server_hostname="127.0.0.1", session=session)


def say_hello(broker: ClosedMosquitto, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> bytes:
    """Return what the broker answers to a client; nothing if it refuses the certificate."""
    try:
        with dial(broker, context, session) as connection:
            connection.sendall(CONNECT)
            return connection.recv(4)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_live_session_of_a_revoked_device_ends_and_another_devices_does_not(broker, roster, tmp_path, caplog):
    async def scenario() -> tuple[bool, bool]:
        stolen = build_link(broker, enroll(broker, roster, tmp_path / "stolen"))
        honest = build_link(broker, enroll(broker, roster, tmp_path / "honest"))
        tasks = [asyncio.create_task(step) for step in (stolen.run(), honest.run())]
        await until(lambda: stolen.connected and honest.connected, "both devices to connect")
        tasks.append(asyncio.create_task(build_lockout(broker, roster).keep_out()))
        roster.revoke("stolen")
        await until(lambda: not stolen.connected, "the stolen device's session to end")
        await until(lambda: "expired, revoked" in caplog.text, "it to come again and be refused")
        answer = stolen.connected, honest.connected
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return answer

    assert asyncio.run(scenario()) == (False, True)


def test_connection_kept_ready_and_a_resumed_tls_session_are_of_no_use_to_a_revoked_device(
    broker, roster, tmp_path, monkeypatch, caplog
):
    """The first was checked before the revocation; the second would spare the check."""
    monkeypatch.setattr(lockout_module, "GRACE_S", 1.0)
    context = enroll(broker, roster, tmp_path / "stolen").build_context()
    with dial(broker, context) as first:
        first.sendall(CONNECT)
        assert first.recv(4) == ACCEPTED
        session = first.session
    assert say_hello(broker, context, session) == ACCEPTED

    async def scenario() -> bytes:
        ready = await asyncio.to_thread(dial, broker, context)
        keeping_out = asyncio.create_task(build_lockout(broker, roster).keep_out())
        roster.revoke("stolen")
        (serial,) = (item.serial for item in roster.list_revoked_certificates())
        await until(lambda: broker.authority.is_crl_current([serial]), "the list of revoked certificates")
        ready.sendall(CONNECT)
        heard = b""
        while part := await asyncio.to_thread(ready.recv, 100):  # until the broker closes it
            heard += part
        await until(lambda: "stolen is revoked, and shut out" in caplog.text, "all to be done")
        keeping_out.cancel()
        return heard

    caplog.set_level(logging.INFO)
    assert asyncio.run(scenario()) in (b"", ACCEPTED)
    assert [item.is_shut_out for item in roster.list_revoked_certificates()] == [True]
    assert say_hello(broker, context, session) == b""


def test_broker_that_restarts_knows_who_is_revoked(broker, roster, tmp_path):
    identity = enroll(broker, roster, tmp_path / "stolen")
    roster.revoke("stolen")
    broker.authority.save_crl(item.serial for item in roster.list_revoked_certificates())
    broker.restart()
    assert say_hello(broker, identity.build_context()) == b""


def test_process_that_only_has_the_brokers_old_number_is_left_alone(broker, roster, tmp_path):
    broker.kill()
    broker.pid_path.write_text(str(os.getpid()))  # SIGHUP would end this process

    async def scenario() -> None:
        keeping_out = asyncio.create_task(build_lockout(broker, roster).keep_out())
        started = time.monotonic()
        await until(lambda: time.monotonic() > started + 0.2, "a few rounds")
        keeping_out.cancel()

    asyncio.run(scenario())
