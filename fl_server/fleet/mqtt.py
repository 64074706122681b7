"""The coordinator's link to the fleet; the only door to paho on the server.

paho's thread only puts items on the loop's queue. Whatever arrives is parsed on the loop, and what is not
what its topic says is counted and forgotten.
"""

import asyncio
import contextlib
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
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
THREAD_PAUSE_S = 1.0  # after an exception in paho's thread, or one that repeats would take a core
TELEMETRY_WAIT_S = 0.25  # for company: a batch costs little more than one message
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


class _Client(Client):
    """Makes a new connection when an exception ends its loop: paho's thread would end in silence."""

    on_lost: Callable[[], None]

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:  # noqa: FBT001, FBT002 - paho's signature
        while True:
            try:
                return super().loop_forever(timeout, retry_first_connection)
            except Exception:
                logger.exception("the link to the broker has failed, and is made anew")
            self.on_lost()
            time.sleep(THREAD_PAUSE_S)
            with contextlib.suppress(OSError):  # the loop tries again
                self.reconnect()


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
        self._items: deque[Item | MQTTMessage] = deque()
        self._are_there = asyncio.Event()
        self._wakes_in_s = math.inf  # the loop has been told to look by then
        self._unconfirmed: dict[int, asyncio.Future[None]] = {}
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)
        self._client = client = _Client(
            CallbackAPIVersion.VERSION2, client_id=f"fl-server.{fleet}", protocol=MQTTv5, reconnect_on_failure=True
        )
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_lost = self._on_disconnect
        client.on_message, client.on_publish = self._on_message, self._on_publish
        client.message_callback_add(build_device_filter(fleet, Channel.TELEMETRY), self._on_telemetry)
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

    async def receive(self) -> list[Item]:
        """Return what happened since the last call, at least one item, oldest first; junk never comes out."""
        while True:
            await self._are_there.wait()
            self._are_there.clear()
            self._wakes_in_s = math.inf  # first: what comes from here on asks for another look
            items = [item for _ in range(len(self._items)) if (item := self._open(self._items.popleft()))]
            if items:
                return items

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

    def _open(self, item: Item | MQTTMessage) -> Item | None:
        if not isinstance(item, MQTTMessage):
            return item
        try:
            return self._parse(item)
        except MalformedError as error:
            self.ignored += 1
            logger.warning("ignored a message (%d so far): %.200s", self.ignored, error)
            return None

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
        # Of telemetry the last counts: queued for a coordinator that is away, it would only crowd out events.
        options = {channel: SubscribeOptions(qos=0 if channel is Channel.TELEMETRY else 1) for channel in _KINDS}
        client.subscribe([(build_device_filter(self._fleet, channel), each) for channel, each in options.items()])
        self._put(Connected())

    def _on_disconnect(self, *_: Any) -> None:
        self._hand_over(self._fail_unconfirmed)
        self._put(Disconnected())

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._put(message)

    def _on_telemetry(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._put(message, wait_s=TELEMETRY_WAIT_S)

    def _on_publish(self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _: Any) -> None:
        self._hand_over(self._confirm, mid, reason)

    def _hand_over(self, function: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has closed: the coordinator is ending
            return

    def _put(self, item: Item | MQTTMessage, *, wait_s: float = 0.0) -> None:
        if len(self._items) >= QUEUE_MAX_ITEMS:
            self.dropped += 1
            return
        self._items.append(item)
        if wait_s < self._wakes_in_s:  # the loop is woken once for many items
            self._wakes_in_s = wait_s
            self._hand_over(self._loop.call_later, wait_s, self._are_there.set)

    # And this on the loop.

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
