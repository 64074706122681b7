"""The device's connection to the broker: the only door to paho.

Every connection has a paho client of its own. Its thread only hands events to the asyncio loop; when that
thread ends, for whatever reason, the connection is over and `Link.run` makes the next one.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.link.backoff import full_jitter
from models.contract.identity import Identity

log = logging.getLogger(__name__)

JSON = "application/json"
_SESSION_EXPIRY_S = 24 * 3600  # a command expires sooner; state is retained
_PACKET_MAX_BYTES = 320 * 1024  # the largest offer (256 KiB) with room; the broker withholds anything longer
_UNDELIVERED_MAX = 64  # messages between paho's thread and the loop; at 64 KiB a chunk 4 MiB
_STALL_TIMEOUT_S = 10.0  # how long paho's thread waits for the loop before it drops a message
_QUEUED_MAX = 1000  # outgoing messages that the broker has not acknowledged
_CONNECT_TIMEOUT_S = 5.0
_LOST = "Unspecified error"  # paho's word for a connection that ended without a reason
_BACKOFF_BASE_S = 1.0
_BACKOFF_CAP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A message for the broker."""

    topic: str
    payload: bytes
    retain: bool = False
    content_type: str = JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where the broker is and who asks.

    Attributes:
        subscriptions: Topics held on every connection.
        identity: Read again for every connection, so that a renewed certificate is used; None for no TLS.
    """

    host: str
    port: int
    client_id: str
    keepalive_s: int
    subscriptions: tuple[str, ...] = ()
    identity: Identity | None = None


class Link:
    """Keeps one connection to the broker; all methods belong to the asyncio loop that runs `run`.

    Attributes:
        connected: Whether the broker has accepted the connection.
        dropped: Messages lost since the start: received but not taken, or refused by the outgoing queue.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        build_will: Callable[[], Publication],
        on_message: Callable[[str, bytes], None],
        on_connected: Callable[[], None],
    ) -> None:
        """Prepare the link.

        Args:
            broker: Where to connect to.
            build_will: Asked before each connection: what the broker says when this device is gone.
            on_message: Called with topic and payload of what the subscriptions bring; must not block.
            on_connected: Called when the broker has accepted.
        """
        self.connected = False
        self.dropped = 0
        self._broker = broker
        self._build_will = build_will
        self._on_message = on_message
        self._on_connected = on_connected
        self._client: _Client | None = None
        self._reads: dict[str, list[asyncio.Future[bytes]]] = {}

    async def run(self) -> None:
        """Connect, and connect again, until cancelled; then the broker publishes the will."""
        jitter, failures = SystemRandom(), 0
        while True:
            was_accepted = await self._connect_once()
            failures = 0 if was_accepted else failures + 1
            delay_s = full_jitter(failures, base_s=_BACKOFF_BASE_S, cap_s=_BACKOFF_CAP_S, generator=jitter)
            await asyncio.sleep(delay_s)

    def publish(self, publication: Publication) -> bool:
        """Hand `publication` to the broker at QoS 1; False if it cannot go out now."""
        if self._client is None or not self.connected:
            return False
        properties = _build_properties(PacketTypes.PUBLISH, ContentType=publication.content_type)
        info = self._client.publish(
            publication.topic, publication.payload, qos=1, retain=publication.retain, properties=properties
        )
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            self.dropped += 1
            return False
        return True

    async def read(self, topic: str, timeout_s: float) -> bytes | None:
        """Return what is retained on exactly `topic`; None if nothing came in `timeout_s`."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        waiting = self._reads.setdefault(topic, [])
        waiting.append(future)
        if len(waiting) == 1:
            self._subscribe([topic], qos=0)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            waiting.remove(future)
            if not waiting and self._reads.get(topic) is waiting:
                self._end_read(topic)

    async def _connect_once(self) -> bool:
        """Return whether the broker accepted, once the connection is over."""
        events = _Events(asyncio.get_running_loop(), self)
        client = _build_client(self._broker, self._build_will(), events)
        try:
            await asyncio.to_thread(_connect, client, self._broker)
        except (OSError, ValueError) as error:
            log.warning("broker %s:%d: %s", self._broker.host, self._broker.port, error)
            return False
        self._client = client
        client.loop_start()
        try:
            reason = await events.ended
        finally:
            was_accepted, self.connected, self._client = self.connected, False, None
            client.disconnect(reasoncode=ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message"))
        if self._broker.identity is not None and not was_accepted and reason == _LOST:
            # TLS 1.3 tells a client of its certificate after the handshake, and paho does not pass it on.
            reason = f"no answer: is {self._broker.identity.cert_path} expired, revoked or of another authority?"
        log.warning("broker %s:%d: connection is over: %s", self._broker.host, self._broker.port, reason)
        return was_accepted

    def accept(self) -> None:
        """The broker has accepted: ask again for everything that is waited for."""
        self.connected = True
        self._subscribe(self._broker.subscriptions, qos=1)
        self._subscribe(list(self._reads), qos=0)
        self._on_connected()

    def deliver(self, topic: str, payload: bytes) -> None:
        """Give a message to who waits for it."""
        if topic in self._reads:
            if payload:  # an empty one says that the retained message was removed
                for future in self._end_read(topic):
                    if not future.done():
                        future.set_result(payload)
            return
        self._on_message(topic, payload)

    def _end_read(self, topic: str) -> list[asyncio.Future[bytes]]:
        if self._client is not None and self.connected:
            self._client.unsubscribe(topic)
        return self._reads.pop(topic)

    def _subscribe(self, topics: Sequence[str], *, qos: int) -> None:
        if self._client is not None and self.connected and topics:
            options = SubscribeOptions(qos=qos)
            self._client.subscribe([(topic, options) for topic in topics])


class _Events:
    """Carries what paho's thread sees to the loop; the methods named `on_` run in that thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: Link) -> None:
        self.ended: asyncio.Future[str] = loop.create_future()
        self._loop = loop
        self._link = link
        self._slots = threading.BoundedSemaphore(_UNDELIVERED_MAX)
        self._reason = "no answer"

    def on_connect(self, _client: object, _data: object, _flags: object, code: ReasonCode, _properties: object) -> None:
        self._reason = str(code)
        if not code.is_failure:
            self._post(self._run, self._link.accept)

    def on_disconnect(
        self, _client: object, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        self._reason = str(code)

    def on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        # Waiting here stops reading from the socket, so that the broker waits too.
        if self._slots.acquire(timeout=_STALL_TIMEOUT_S):
            self._post(self._take, message.topic, bytes(message.payload))
        else:
            self._post(self._drop)

    def on_end(self, error: Exception | None) -> None:
        if error is not None:
            self._reason = f"{type(error).__name__}: {error}"
        self._post(self._end)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *arguments)

    def _take(self, topic: str, payload: bytes) -> None:
        self._slots.release()
        self._run(self._link.deliver, topic, payload)

    def _drop(self) -> None:
        self._link.dropped += 1

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        if self.ended.done():  # of a connection that was given up
            return
        try:
            function(*arguments)
        except Exception:
            log.exception("a message or event of the broker could not be handled")

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(self._reason)


class _Client(paho.Client):
    """Tells when its thread ends: paho itself says nothing if an exception ends it."""

    on_end: Callable[[Exception | None], None]

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:  # noqa: FBT001, FBT002 - paho's signature
        ended_by: Exception | None = None
        try:
            return super().loop_forever(timeout, retry_first_connection)
        except Exception as error:  # noqa: BLE001 - bytes of the broker went through code that is not ours
            ended_by = error
            return MQTTErrorCode.MQTT_ERR_UNKNOWN
        finally:
            self.on_end(ended_by)


def _build_client(broker: Broker, will: Publication, events: _Events) -> _Client:
    client = _Client(CallbackAPIVersion.VERSION2, broker.client_id, protocol=paho.MQTTv5, reconnect_on_failure=False)
    client.suppress_exceptions = True  # one in a callback would end the thread
    client.connect_timeout = _CONNECT_TIMEOUT_S
    client.max_queued_messages_set(_QUEUED_MAX)
    client.on_connect = events.on_connect
    client.on_disconnect = events.on_disconnect
    client.on_message = events.on_message
    client.on_socket_open = _set_no_delay
    client.on_end = events.on_end
    properties = _build_properties(PacketTypes.WILLMESSAGE, ContentType=will.content_type)
    client.will_set(will.topic, will.payload, qos=1, retain=will.retain, properties=properties)
    return client


def _connect(client: _Client, broker: Broker) -> None:
    properties = _build_properties(
        PacketTypes.CONNECT, SessionExpiryInterval=_SESSION_EXPIRY_S, MaximumPacketSize=_PACKET_MAX_BYTES
    )
    if broker.identity is not None:
        client.tls_set_context(broker.identity.build_context())
    client.connect(broker.host, broker.port, broker.keepalive_s, clean_start=False, properties=properties)


def _build_properties(kind: int, **values: str | int) -> Properties:
    properties = Properties(kind)  # type: ignore[no-untyped-call] # paho's own gap
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _set_no_delay(_client: object, _data: object, connection: Any) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or small messages wait 41 ms for Nagle
