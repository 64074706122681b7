"""The broker as shipped, against everybody who should not be there."""

import datetime as dt
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import paho.mqtt.client as paho
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fl_server import authority as authority_module
from fl_server.authority import Authority, encode, encode_key
from models.contract.identity import Identity
from tests.simulators.mosquitto import ClosedMosquitto
from tests.simulators.waiting import wait_until

TOPICS = "fl/v1/demo"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedMosquitto]:
    with ClosedMosquitto(tmp_path_factory.mktemp("federation")) as broker:
        yield broker


def issue(authority: Authority, directory: Path, device_id: str) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    (directory / "device.pem").write_bytes(encode(authority.issue_device(device_id, key.public_key())))
    (directory / "device.key").write_bytes(encode_key(key))
    return Identity(
        ca_path=authority.crl_path.with_name("ca.pem"),
        cert_path=directory / "device.pem",
        key_path=directory / "device.key",
    )


class Stranger:
    """Anybody with an MQTT client of their own; a context that leaves."""

    def __init__(
        self, broker: ClosedMosquitto, context: ssl.SSLContext, *, client_id: str = "", will_topic: str | None = None
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.was_accepted = self.is_over = False
        self._published: set[int] = set()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        self._client.tls_set_context(context)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = lambda _client, _data, message: self.heard.append((message.topic, message.payload))
        self._client.on_publish = lambda _client, _data, number, _reason, _properties: self._published.add(number)
        if will_topic is not None:
            self._client.will_set(will_topic, b"will", qos=1)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600
        try:
            self._client.connect("127.0.0.1", broker.port, clean_start=False, properties=session)
        except OSError:
            self.is_over = True
        self._client.loop_start()
        wait_until(lambda: self.was_accepted or self.is_over, "the broker's answer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str) -> None:
        number = self._client.publish(topic, b"?", qos=1).mid
        wait_until(lambda: number in self._published, "the broker's answer to a message")

    def subscribe(self, *topics: str) -> None:
        answered: list[object] = []
        self._client.on_subscribe = lambda *_: answered.append(1)
        self._client.subscribe([(topic, 1) for topic in topics])
        wait_until(lambda: answered, "the broker's answer to a subscription")

    def vanish(self) -> None:
        """End without a goodbye, so that the will goes out."""
        self._client.socket().close()
        self._client.loop_stop()

    def _on_connect(self, _client, _data, _flags, reason, _properties) -> None:
        self.was_accepted = not reason.is_failure

    def _on_disconnect(self, *_: object) -> None:
        self.is_over = True


def coordinator(broker: ClosedMosquitto) -> Identity:
    ca_dir = broker.ca_dir
    return Identity(
        ca_path=ca_dir / "ca.pem", cert_path=ca_dir / "coordinator.pem", key_path=ca_dir / "coordinator.key.pem"
    )


def is_let_in(broker: ClosedMosquitto, context: ssl.SSLContext) -> bool:
    with Stranger(broker, context, client_id="device-1") as stranger:
        return stranger.was_accepted


def test_member_is_let_in_and_who_has_only_the_authoritys_certificate_is_not(broker, tmp_path):
    assert is_let_in(broker, issue(broker.authority, tmp_path, "device-1").build_context())
    assert not is_let_in(broker, ssl.create_default_context(cafile=broker.ca_dir / "ca.pem"))


def test_certificate_of_another_authority_is_refused(broker, tmp_path):
    foreign = Authority.create(tmp_path / "ca", fleet=broker.fleet)  # the same names, another key
    identity = issue(foreign, tmp_path, "device-1")
    context = ssl.create_default_context(cafile=broker.ca_dir / "ca.pem")
    context.load_cert_chain(identity.cert_path, identity.key_path)
    assert not is_let_in(broker, context)


def test_expired_certificate_is_refused(broker, tmp_path, monkeypatch):
    monkeypatch.setattr(authority_module, "DEVICE_LIFETIME", dt.timedelta(seconds=-1))
    assert not is_let_in(broker, issue(broker.authority, tmp_path, "device-1").build_context())


def test_servers_certificate_is_no_clients(broker):
    ca_dir = broker.ca_dir
    identity = Identity(ca_path=ca_dir / "ca.pem", cert_path=ca_dir / "broker.pem", key_path=ca_dir / "broker.key.pem")
    assert not is_let_in(broker, identity.build_context())


def test_device_does_not_take_a_certificate_of_another_device_for_the_broker(broker, tmp_path):
    """What a stolen device can offer: it holds a certificate and key of the federation, and the client checks whose."""
    identity = issue(broker.authority, tmp_path, "127.0.0.1")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(identity.cert_path, identity.key_path)
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = identity.build_context().wrap_bio(ours, theirs, server_hostname="127.0.0.1")
    other = server.wrap_bio(theirs, ours, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        other.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError):
        client.do_handshake()


def test_device_cannot_speak_for_another_nor_hear_what_is_not_its_own(broker, tmp_path):
    victim, thief = tmp_path / "victim", tmp_path / "thief"
    victim.mkdir()
    thief.mkdir()
    channels = ("status", "telemetry", "event", "ack", "command")
    with (
        Stranger(broker, coordinator(broker).build_context()) as server,
        Stranger(broker, issue(broker.authority, victim, "device-1").build_context()) as own,
    ):
        server.subscribe(f"{TOPICS}/device/+/status", f"{TOPICS}/device/+/telemetry", f"{TOPICS}/device/+/event")
        own.subscribe(f"{TOPICS}/device/device-1/command")
        identity = issue(broker.authority, thief, "device-2")
        # It claims the other's client id: nobody's session ends, as the certificate says who it is.
        with Stranger(broker, identity.build_context(), client_id="device-1") as other:
            other.subscribe("#", "$SYS/#", "$share/group/fl/v1/demo/device/+/event")
            for channel in channels:
                other.publish(f"{TOPICS}/device/device-1/{channel}")
            for topic in ("offer", "run/digits", "blob/a/0", "device/device-2/command", "device/device-2/ack"):
                other.publish(f"{TOPICS}/{topic}")
            other.publish(f"{TOPICS}/device/device-2/status")
            for topic in ("device/device-1/command", "device/device-1/ack", "device/device-2/command", "offer"):
                server.publish(f"{TOPICS}/{topic}")
            wait_until(lambda: len(other.heard) >= 2, "what the device may hear")
            assert [topic for topic, _ in other.heard] == [f"{TOPICS}/device/device-2/command", f"{TOPICS}/offer"]
        with Stranger(broker, identity.build_context(), will_topic=f"{TOPICS}/device/device-1/status") as other:
            other.vanish()
        with Stranger(broker, identity.build_context()) as other:  # the broker is past the other's will
            other.publish(f"{TOPICS}/device/device-2/event")
        wait_until(lambda: len(server.heard) >= 2, "what the coordinator may hear")
        assert [topic for topic, _ in server.heard] == [
            f"{TOPICS}/device/device-2/status",
            f"{TOPICS}/device/device-2/event",
        ]
        assert own.heard == [(f"{TOPICS}/device/device-1/command", b"?")]
        assert not own.is_over
