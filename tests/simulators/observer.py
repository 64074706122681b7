"""A client that sees everything a broker carries, and can say anything."""

import json
import threading
from dataclasses import dataclass
from socket import IPPROTO_TCP, TCP_NODELAY
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.simulators.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Seen:
    topic: str
    payload: bytes
    retained: bool


class Observer:
    """Subscribed to `#`; a context that disconnects."""

    def __init__(self, port: int) -> None:
        self._lock = threading.Lock()
        self._seen: list[Seen] = []
        self._client = paho.Client(CallbackAPIVersion.VERSION2, f"observer-{uuid4()}", protocol=paho.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_message = self._note
        self._client.on_socket_open = lambda _client, _data, opened: opened.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        wait_until(self._client.is_connected, "the observer to connect")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(10)

    def seen(self, channel: str) -> list[Seen]:
        """Return what came so far on topics that end with `channel`."""
        with self._lock:
            return [message for message in self._seen if message.topic.endswith(channel)]

    def documents(self, channel: str) -> list[dict[str, Any]]:
        """Return what came so far on topics that end with `channel` and is a JSON object."""
        parsed = (_parse(message.payload) for message in self.seen(channel))
        return [document for document in parsed if isinstance(document, dict)]

    def _note(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        with self._lock:
            self._seen.append(Seen(message.topic, bytes(message.payload), message.retain))


def _parse(payload: bytes) -> object:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None
