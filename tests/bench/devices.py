"""Light devices that all fetch the same bytes at once: raw sockets, MQTT 5 or HTTP, in a process of its own.

They say "ready" once all are connected, begin at the first line of standard input, and say "done" once each has every
byte. Bytes are counted and thrown away, the same way for both protocols.
"""

import json
import selectors
import socket
import ssl
import struct
import sys
from collections import deque
from typing import Protocol

WINDOW = 4  # chunks that a device waits for at once, as an agent does
TIMEOUT_S = 60.0
_BUFFER_BYTES = 256 * 1024


class Device(Protocol):
    """What one connection sends and takes."""

    connection: socket.socket

    def begin(self) -> None: ...

    def take(self, data: memoryview) -> None: ...

    @property
    def is_done(self) -> bool: ...


class MqttDevice:
    """Fetches retained chunks by exact topic: subscribes, takes one message, unsubscribes."""

    def __init__(self, connection: socket.socket, name: str, topics: list[str], size_bytes: int) -> None:
        self.connection = connection
        self._waiting, self._left, self._open = deque(topics), size_bytes, deque[str]()
        self._head, self._skip = b"", 0
        identity = _text(name)
        connection.sendall(_packet(0x10, _text("MQTT") + b"\x05\x02" + struct.pack(">H", 600) + b"\x00" + identity))
        if connection.recv(256)[:1] != b"\x20":
            raise ConnectionError("the broker does not take the connection")

    @property
    def is_done(self) -> bool:
        return self._left == 0

    def begin(self) -> None:
        self.connection.sendall(b"".join(self._subscribe() for _ in range(min(WINDOW, len(self._waiting)))))

    def take(self, data: memoryview) -> None:
        start, answers = 0, b""
        while start < len(data):
            if self._skip:
                taken = min(self._skip, len(data) - start)
                self._skip -= taken
                start += taken
                continue
            self._head += bytes(data[start : start + 1])
            start += 1
            kind, remaining = self._read_head()
            if kind is not None:
                self._skip, self._head = remaining, b""
                if kind == 0x30:  # a message; answers to subscriptions are skipped alike
                    topic = self._open.popleft()  # answers come in the order of the subscriptions
                    self._left -= remaining - 3 - len(topic)
                    answers += _packet(0xA2, b"\x00\x02\x00" + _text(topic)) + self._subscribe()
        if answers:
            self.connection.sendall(answers)

    def _read_head(self) -> tuple[int | None, int]:
        if len(self._head) < 2 or self._head[-1] & 0x80:
            return None, 0
        return self._head[0] & 0xF0, sum((byte & 0x7F) << 7 * place for place, byte in enumerate(self._head[1:]))

    def _subscribe(self) -> bytes:
        if not self._waiting:
            return b""
        topic = self._waiting.popleft()
        self._open.append(topic)
        return _packet(0x82, b"\x00\x01\x00" + _text(topic) + b"\x00")


class HttpDevice:
    """Fetches one file with one request."""

    def __init__(self, connection: socket.socket, path: str, size_bytes: int) -> None:
        self.connection = connection
        self._path, self._left, self._head = path, size_bytes, b""

    @property
    def is_done(self) -> bool:
        return self._left == 0

    def begin(self) -> None:
        self.connection.sendall(f"GET {self._path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def take(self, data: memoryview) -> None:
        if b"\r\n\r\n" in self._head:
            self._left -= len(data)
            return
        self._head += bytes(data)
        head, separator, body = self._head.partition(b"\r\n\r\n")
        if separator:
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(head.decode(errors="replace"))
            self._head, self._left = separator, self._left - len(body)


def fetch_all(devices: list[Device]) -> None:
    """Let all devices fetch, until each has every byte."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with selectors.DefaultSelector() as selector:
        for device in devices:
            selector.register(device.connection, selectors.EVENT_READ, device)
        for device in devices:
            device.begin()
        waiting = len(devices)
        while waiting:
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"{waiting} devices wait in vain")
            for key, _ in ready:
                _receive(key.data, buffer)
                if key.data.is_done:
                    selector.unregister(key.fileobj)
                    waiting -= 1


def _receive(device: Device, buffer: memoryview) -> None:
    connection, more = device.connection, True
    while more:
        size = connection.recv_into(buffer)
        if not size:
            raise ConnectionError("the server has closed a connection")
        device.take(buffer[:size])
        more = isinstance(connection, ssl.SSLSocket) and connection.pending() > 0


def _packet(head: int, body: bytes) -> bytes:
    assert len(body) < 16384
    length = bytes([len(body)]) if len(body) < 128 else bytes([len(body) & 0x7F | 0x80, len(body) >> 7])
    return bytes([head]) + length + body


def _text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _open(port: int, context: ssl.SSLContext | None) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection if context is None else context.wrap_socket(connection, server_hostname="127.0.0.1")


def main() -> None:
    job = json.loads(sys.argv[1])
    context = ssl.create_default_context(cafile=job["ca"]) if job["ca"] else None
    opened = [_open(job["port"], context) for _ in range(job["devices"])]
    if job["protocol"] == "mqtt":
        name, topics, size = job["name"], job["topics"], job["size_bytes"]
        devices: list[Device] = [MqttDevice(own, f"{name}-{n}", topics, size) for n, own in enumerate(opened)]
    else:
        devices = [HttpDevice(own, job["path"], job["size_bytes"]) for own in opened]
    print("ready", flush=True)
    sys.stdin.readline()
    fetch_all(devices)
    print("done", flush=True)


if __name__ == "__main__":
    main()
