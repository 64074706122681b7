"""A load generator that costs little per request: a process of its own, raw sockets, the same bytes again and again.

It shares the machine's cores with the server that it measures; `cpu_share` says how much of one core it took.
"""

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

WARM_UP_S = 0.3
ANSWER_TIMEOUT_S = 20.0
_CHUNK_BYTES = 16 * 1024  # a larger buffer would be mapped anew for every answer
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_REPOSITORY = Path(__file__).parents[2]

Address = str | tuple[str, int]  # a Unix socket is its path


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a while of load showed.

    Attributes:
        rate: Answers a second.
        p50_us, p99_us: From before a request is sent until its answer is whole.
        requests: Answered, whatever the answer.
        failures: Of them, those that were not 200; and connections that ended.
        cpu_share: Of one core, taken by the load generator itself.
    """

    rate: float
    p50_us: float
    p99_us: float
    requests: int
    failures: int
    cpu_share: float


def build_post(path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a whole request that keeps its connection."""
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def measure(address: Address, request: bytes, *, connections: int, seconds: float) -> Load:
    """Return what the server at `address` did under load for a while."""
    with running(address, request, connections=connections, seconds=seconds) as process:
        return finish(process)


@contextlib.contextmanager
def running(address: Address, request: bytes, *, connections: int, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Load the server at `address` for `seconds`, or until `finish(process, now=True)`."""
    job = json.dumps({"address": address, "connections": connections, "seconds": seconds})
    command = [sys.executable, "-m", "tests.bench.load", job]
    with subprocess.Popen(command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.close()
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[bytes], *, now: bool = False) -> Load:
    """Return what the load has shown when it is over, or now."""
    if now:
        process.terminate()
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait() == 0, "the load generator failed"
    return Load(**json.loads(output))


class _Connection:
    """One connection, with one request under way."""

    __slots__ = ("_address", "_heads", "_request", "_so_far", "failures", "sent_s", "socket")

    def __init__(self, address: Address, request: bytes) -> None:
        self._address, self._request = address, request
        self._heads: dict[bytes, tuple[int, bool]] = {}  # an answer's head: its whole length, and whether it is 200
        self.failures = 0
        self.sent_s = 0.0
        self._so_far = b""
        self.socket = _connect(address)

    def open_anew(self) -> None:
        """Send again on another connection."""
        old, self.socket = self.socket, _connect(self._address)
        old.close()
        self._so_far = b""
        self.send()

    def send(self) -> None:
        self.sent_s = time.perf_counter()
        self.socket.sendall(self._request)

    def receive(self) -> bool:
        """Return whether the answer is whole now; blocks for one part of it.

        Raises:
            OSError: The connection has ended.
        """
        part = self.socket.recv(_CHUNK_BYTES)
        if not part:
            raise ConnectionError("closed")
        data = self._so_far + part if self._so_far else part
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            length, is_ok = self._parse(data[:end])
            if len(data) >= length:
                self._so_far = b""
                self.failures += not is_ok
                return True
        self._so_far = data
        return False

    def _parse(self, head: bytes) -> tuple[int, bool]:
        known = self._heads.get(head)
        if known is None:
            found = _LENGTH.search(head)
            length = len(head) + 4 + (int(found[1]) if found else 0)
            known = self._heads[head] = (length, head.startswith(b"HTTP/1.1 200"))
        return known


class _Run:
    """All connections of this process; one that ends is a failure and is opened anew."""

    def __init__(self, address: Address, request: bytes, connections: int) -> None:
        self._connections = [_Connection(address, request) for _ in range(connections)]
        self._durations = array("d")
        self._is_over = False

    def stop(self) -> None:
        self._is_over = True

    def go(self, seconds: float) -> Load:
        self._spend(WARM_UP_S)
        self._durations = array("d")
        for connection in self._connections:
            connection.failures = 0
        started_s, begun_s = time.perf_counter(), time.process_time()
        self._spend(seconds)
        elapsed_s, cpu_s = time.perf_counter() - started_s, time.process_time() - begun_s
        durations = sorted(self._durations) or [ANSWER_TIMEOUT_S]
        return Load(
            rate=len(self._durations) / elapsed_s,
            p50_us=durations[len(durations) // 2] * 1e6,
            p99_us=durations[len(durations) * 99 // 100] * 1e6,
            requests=len(self._durations),
            failures=sum(connection.failures for connection in self._connections),
            cpu_share=cpu_s / elapsed_s,
        )

    def _spend(self, seconds: float) -> None:
        """Send for a while, and receive until nothing is under way."""
        end_s = time.perf_counter() + seconds
        for connection in self._connections:
            connection.send()
        if len(self._connections) == 1:  # spares the floor of a latency one system call
            connection = self._connections[0]
            while self._advance(connection, end_s):
                pass
            return
        with select.epoll() as poll:
            waiting = {connection.socket.fileno(): connection for connection in self._connections}
            for number in waiting:
                poll.register(number, select.EPOLLIN)
            while waiting:
                for number, _ in poll.poll(ANSWER_TIMEOUT_S):
                    connection = waiting[number]
                    if not self._advance(connection, end_s):
                        poll.unregister(number)
                        del waiting[number]
                    elif (new := connection.socket.fileno()) != number:
                        poll.register(new, select.EPOLLIN)
                        waiting[new] = waiting.pop(number)

    def _advance(self, connection: _Connection, end_s: float) -> bool:
        """Take what has come, and send the next request; return False when there is no next one."""
        try:
            if not connection.receive():
                return True
            now_s = time.perf_counter()
            self._durations.append(now_s - connection.sent_s)
            if now_s >= end_s or self._is_over:
                return False
            connection.send()
        except OSError:
            connection.failures += 1
            connection.open_anew()
        return True


def _connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(address)
    else:
        made = socket.create_connection(address)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.settimeout(ANSWER_TIMEOUT_S)
    return made


def main() -> None:
    """Do the job in the first argument, with the request on stdin."""
    job = json.loads(sys.argv[1])
    address = job["address"] if isinstance(job["address"], str) else tuple(job["address"])
    run = _Run(address, sys.stdin.buffer.read(), job["connections"])
    signal.signal(signal.SIGTERM, lambda *_: run.stop())
    print(json.dumps(asdict(run.go(job["seconds"]))))


if __name__ == "__main__":
    main()
