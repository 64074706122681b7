"""The coordinator's link to the fleet; the only door to paho on the server.

paho's thread only puts items on the loop's queue. Whatever arrives is parsed on the loop, and what is not
what its topic says is counted and forgotten.
"""

import asyncio
import logging
import socket
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fl_server.errors import ServerError
from models.contract.encoding import parse_json
from models.contract.errors import MalformedError
from models.contract.identity import Identity
from models.contract.messages import MESSAGE_MAX_BYTES, Event, Status, Telemetry
from models.contract.topics import Channel, build_device_filter, parse_device_topic

logger = logging.getLogger(__name__)

CONFIRM_TIMEOUT_S = 10.0  # a publish over the broker's size limit is never confirmed, nor refused
IN_FLIGHT = 20  # mosquitto's receive maximum
QUEUE_MAX_ITEMS = 10_000  # what does not fit is counted; events come again, as they are not acknowledged
SESSION_EXPIRY_S = 3600  # the broker keeps events for a coordinator that restarts
_KINDS: dict[Channel, type[Status | Telemetry | Event]] = {
    Channel.STATUS: Status,
    Channel.TELEMETRY: Telemetry,
    Channel.EVENT: Event,
}


class LinkError(ServerError):
    """The broker did not take a message; it is published again after the next connection."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker is there, perhaps as a new one without what was retained."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The broker is away; paho keeps dialling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FromDevice:
    """A well-formed message of a device that may or may not be enrolled."""

    device_id: str
    document: Status | Telemetry | Event


Item: TypeAlias = Connected | Disconnected | FromDevice


class Link:
    """MQTT 5 client of the coordinator, used on one event loop.

    Attributes:
        ignored: Messages that were not what their topic says.
        dropped: Messages that found the queue full.
    """

    def __init__(self, *, host: str, port: int, fleet: str, identity: Identity | None = None) -> None:
        """Prepare the link; with `identity`, None for no TLS, as the coordinator.

        Raises:
            OSError: A file of the identity cannot be used.
        """
        self.ignored = 0
        self.dropped = 0
        self._host, self._port, self._fleet = host, port, fleet
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | MQTTMessage] = asyncio.Queue(QUEUE_MAX_ITEMS)
        self._unconfirmed: dict[int, asyncio.Future[None]] = {}
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)
        self._client = client = Client(
            CallbackAPIVersion.VERSION2, client_id=f"fl-server.{fleet}", protocol=MQTTv5, reconnect_on_failure=True
        )
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_message, client.on_publish = self._on_message, self._on_publish
        client.on_socket_open = _disable_delay
        if identity is not None:
            client.tls_set_context(identity.build_context())
        client.reconnect_delay_set(min_delay=1, max_delay=8)

    async def __aenter__(self) -> Self:
        session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        session.SessionExpiryInterval = SESSION_EXPIRY_S
        self._client.connect_async(self._host, self._port, keepalive=30, clean_start=False, properties=session)
        self._client.loop_start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected()

    async def receive(self) -> Item:
        """Return what happened next; junk never comes out."""
        while True:
            item = await self._items.get()
            if not isinstance(item, MQTTMessage):
                return item
            try:
                return self._parse(item)
            except MalformedError as error:
                self.ignored += 1
                logger.warning("ignored a message (%d so far): %.200s", self.ignored, error)

    async def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, content_type: str = "application/json"
    ) -> None:
        """Publish with QoS 1 and return once the broker has confirmed; an empty retained payload clears.

        Raises:
            LinkError: The broker is away, or did not confirm in time.
        """
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = content_type
        async with self._in_flight:
            if not self.is_connected:
                raise LinkError(f"broker {self._host}:{self._port} is away")
            info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
            confirmed = self._unconfirmed[info.mid] = self._loop.create_future()
            try:
                async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                    await confirmed
            except TimeoutError as error:
                raise LinkError(f"the broker did not confirm {topic} within {CONFIRM_TIMEOUT_S:.0f} s") from error
            finally:
                self._unconfirmed.pop(info.mid, None)

    def _parse(self, message: MQTTMessage) -> FromDevice:
        try:
            topic = parse_device_topic(self._fleet, message.topic)
        except UnicodeDecodeError as error:
            raise MalformedError(f"topic: {error}") from error
        kind = _KINDS.get(topic.channel)
        if kind is None:
            raise MalformedError(f"topic {message.topic!r:.120} is not for the coordinator")
        try:
            document = parse_json(bytes(message.payload), kind, max_bytes=MESSAGE_MAX_BYTES)
        except MalformedError as error:
            raise MalformedError(f"{message.topic}: {error}") from error
        return FromDevice(device_id=topic.device_id, document=document)

    # What follows runs on paho's thread, where an exception would end it in silence.

    def _on_connect(self, client: Client, _userdata: Any, _flags: ConnectFlags, reason: ReasonCode, _: Any) -> None:
        if reason.is_failure:
            logger.warning("broker %s:%d refuses: %s", self._host, self._port, reason)
            return
        options = SubscribeOptions(qos=1)
        client.subscribe([(build_device_filter(self._fleet, channel), options) for channel in _KINDS])
        self._hand_over(self._put, Connected())

    def _on_disconnect(self, *_: Any) -> None:
        self._hand_over(self._fail_unconfirmed)
        self._hand_over(self._put, Disconnected())

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._hand_over(self._put, message)

    def _on_publish(self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _: Any) -> None:
        self._hand_over(self._confirm, mid, reason)

    def _hand_over(self, function: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has closed: the coordinator is ending
            return

    # And this on the loop.

    def _put(self, item: Item | MQTTMessage) -> None:
        try:
            self._items.put_nowait(item)
        except asyncio.QueueFull:
            self.dropped += 1

    def _confirm(self, mid: int, reason: ReasonCode) -> None:
        confirmed = self._unconfirmed.get(mid)
        if confirmed is None or confirmed.done():
            return
        if reason.is_failure:
            confirmed.set_exception(LinkError(f"the broker refuses a message: {reason}"))
        else:
            confirmed.set_result(None)

    def _fail_unconfirmed(self) -> None:
        for confirmed in self._unconfirmed.values():
            if not confirmed.done():
                confirmed.set_exception(LinkError(f"broker {self._host}:{self._port} went away"))


def end_session(host: str, port: int, *, client_id: str, identity: Identity) -> None:
    """Connect as `client_id` and leave: the broker ends what that client had open, and forgets what it kept for it.

    Raises:
        LinkError: The broker is away, or refuses.
    """
    answered, reasons = threading.Event(), list[ReasonCode]()

    def take(_client: Client, _userdata: Any, _flags: ConnectFlags, reason: ReasonCode, _: Any) -> None:
        reasons.append(reason)
        answered.set()

    client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTv5, reconnect_on_failure=False)
    client.on_connect = take
    try:
        client.tls_set_context(identity.build_context())
        client.connect(host, port, clean_start=True)  # no session expiry: it ends with the connection
    except OSError as error:
        raise LinkError(f"broker {host}:{port}: {error}") from error
    client.loop_start()
    try:
        if not answered.wait(CONFIRM_TIMEOUT_S) or reasons[0].is_failure:
            raise LinkError(f"the session of {client_id} did not end: {reasons[0] if reasons else 'no answer'}")
    finally:
        client.disconnect()
        client.loop_stop()


def _disable_delay(_client: Client, _userdata: Any, connection: Any) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else small messages wait 41 ms for Nagle
