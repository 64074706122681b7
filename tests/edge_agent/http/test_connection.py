"""HTTP/1.1 on the wire: order, limits, slow and broken clients, and the end of the server."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.http.answers import Answer
from edge_agent.http.connection import Request
from edge_agent.http.listener import Limits, Waiting
from edge_agent.http.server import HttpServer
from tests.simulators.waiting import wait_until

SMALL = Limits(
    body_bytes=100_000,
    bodies_bytes=250_000,
    head_bytes=4096,
    headers=20,
    connections=20,
    request_s=1.0,
    keep_alive_s=3.0,
    write_s=1.0,
    linger_s=1.0,
    drain_s=2.0,
)
GET = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


class Site:
    """A server on a thread; what it answers is what it was asked."""

    def __init__(self, limits: Limits = SMALL) -> None:
        self.limits = limits
        self.requests: list[Request] = []
        self.held: list[Request] = []
        self._ready = threading.Event()
        self._sockets = [socket.create_server(("127.0.0.1", 0), backlog=128)]
        self.address = self._sockets[0].getsockname()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def list_connections(self) -> list[Waiting]:
        return [each for _, listener in self._server._listeners for each in listener.connections]

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._server.stop)

    def call(self, function: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self._loop = runner.get_loop()
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._server = HttpServer(self._handle, self._sockets, self.limits)
        serving = asyncio.create_task(self._server.serve())
        await self._server.wait_listening()
        self._ready.set()
        await serving

    def _handle(self, request: Request) -> None:
        self.requests.append(request)
        if request.head.target.startswith(b"/later"):
            self._loop.call_later(0.05, request.reply, self.answer(request))
        elif request.head.target.startswith(b"/hold"):
            self.held.append(request)
        elif request.head.target.startswith(b"/large"):
            request.reply(Answer(b"x" * 50_000_000))
        else:
            request.reply(self.answer(request))

    @staticmethod
    def answer(request: Request) -> Answer:
        said = {
            "method": request.head.method.decode(),
            "target": request.head.target.decode(),
            "bytes": len(request.body),
        }
        return Answer(json.dumps(said).encode())

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


class Reader:
    """Answers of one connection, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def read(self, *, has_body: bool = True) -> tuple[int, dict[str, str], bytes]:
        line = self._file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while (field := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = field.decode().partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0)) if has_body else 0
        return int(line.split()[1]), headers, self._file.read(length)

    def is_at_end(self) -> bool:
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True


def ask(site: Site, data: bytes) -> tuple[int, dict[str, str], bytes]:
    with site.connect() as connection:
        connection.sendall(data)
        return Reader(connection).read()


def is_served(site: Site) -> bool:
    return ask(site, GET % 1)[0] == 200


def test_requests_sent_ahead_are_answered_in_order_however_long_each_takes(site: Site) -> None:
    targets = [b"/later1", b"/2", b"/3", b"/later4", b"/5"] * 30
    with site.connect() as connection:
        connection.sendall(b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target for target in targets))
        answers = Reader(connection)
        assert [json.loads(answers.read()[2])["target"].encode() for _ in targets] == targets


def test_request_that_comes_byte_by_byte_is_one_request(site: Site) -> None:
    with site.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc":
            connection.sendall(bytes([byte]))
        assert json.loads(Reader(connection).read()[2]) == {"method": "POST", "target": "/slow", "bytes": 3}


def test_head_that_has_come_before_is_read_as_the_first_time_however_it_comes(site: Site) -> None:
    request = b"POST /again HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    with site.connect() as connection:
        answers = Reader(connection)
        for parts in ([request], [request], [request[:60], request[60:]], [request[:20], request[20:]], [request * 3]):
            for part in parts:
                connection.sendall(part)
                assert is_served(site)  # so that the next part comes alone
            for _ in range(b"".join(parts).count(request)):
                assert json.loads(answers.read()[2]) == {"method": "POST", "target": "/again", "bytes": 3}


def test_part_of_one_head_is_never_taken_for_another_head(site: Site) -> None:
    inner = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
    for before in (b"GET /outer HTTP/1.1\r\nX: ", b"POST /outer HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(inner)):
        with site.connect() as connection:
            connection.sendall(before)
            assert is_served(site)
            connection.sendall(inner)
            assert json.loads(Reader(connection).read()[2])["target"] == "/outer"
        assert json.loads(ask(site, inner)[2])["target"] == "/inner"


def test_chunked_body_with_extension_and_trailer(site: Site) -> None:
    chunks = b"5;a=b\r\nhello\r\n" * 3 + b"0\r\nTrailer: x\r\n\r\n"
    status, _, body = ask(site, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert (status, json.loads(body)["bytes"]) == (200, 15)


def test_client_that_expects_to_be_asked_for_its_body_is(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        answers = Reader(connection)
        assert answers.read()[0] == 100
        connection.sendall(b"abc")
        assert json.loads(answers.read()[2])["bytes"] == 3
    with site.connect() as connection:  # behind another request, the invitation comes after its answer
        head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        connection.sendall(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n" + head)
        answers = Reader(connection)
        assert [answers.read()[0], answers.read()[0]] == [200, 100]
        connection.sendall(b"abc")
        assert answers.read()[0] == 200


def test_head_is_answered_without_a_body_and_the_connection_goes_on(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n" + GET % 2)
        answers = Reader(connection)
        assert int(answers.read(has_body=False)[1]["content-length"]) > 0
        assert json.loads(answers.read()[2])["target"] == "/2"


def test_connection_ends_where_the_client_wants_it_to(site: Site) -> None:
    for head in (b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
        with site.connect() as connection:
            connection.sendall(head + GET % 2)
            answers = Reader(connection)
            assert answers.read()[1]["connection"] == "close"
            assert answers.is_at_end()
    with site.connect() as connection:
        connection.sendall(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
        answers = Reader(connection)
        assert [answers.read()[1]["connection"] for _ in range(2)] == ["keep-alive"] * 2


def test_client_that_closes_its_side_still_gets_its_answers(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        connection.shutdown(socket.SHUT_WR)
        answers = Reader(connection)
        assert [answers.read()[0], answers.read()[0]] == [200, 200]
        assert answers.is_at_end()


def test_offer_of_another_protocol_is_passed_over(site: Site) -> None:
    upgrade = b"GET /u HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello"
    assert ask(site, upgrade)[0] == 200
    assert ask(site, b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"FOO / HTTP/1.1\r\n\r\n", 400, "HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00", 400, "HTTP/1.1"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "one header Host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400, "HTTP/1.1"),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (1 << 63), 413, "at most 100000 bytes"),
        (b"POST / HTTP/1.1\r\nContent-Length: 100001\r\n\r\n", 413, "at most 100000 bytes"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "HTTP/1.1"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 100_001, 413, "at most"),
        (b"POST / HTTP/1.1\r\nExpect: tea\r\nContent-Length: 1\r\n\r\n", 417, "100-continue"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % each for each in range(21)) + b"\r\n", 431, "20 headers"),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 5000 + b"\r\n\r\n", 431, "4096 bytes"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 431, "4096 bytes"),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 1_000_000, 431, "4096 bytes"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: " + b"b" * 1_000_000, 431, "4096 bytes"),
    ],
)
def test_what_is_no_request_is_refused_and_ends_the_connection(site: Site, data: bytes, status: int, said: str) -> None:
    with site.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(GET % 1 + data)
        answers = Reader(connection)
        assert answers.read()[0] == 200  # what came before it is answered first
        found, headers, body = answers.read()
        assert (found, headers["connection"]) == (status, "close")
        assert said in json.loads(body)["error"]
        assert answers.is_at_end()
    assert is_served(site)


def test_refusal_reaches_a_client_that_is_still_sending(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(400):
            connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert Reader(connection).read()[0] == 413


def test_all_bodies_together_are_bounded(site: Site) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 99_000
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(site.connect()) for _ in range(3)]
        for sender in senders:
            sender.sendall(head)
        status, headers, _ = Reader(senders[2]).read()
        assert (status, headers["retry-after"]) == (503, "1")
        senders[0].sendall(b"x" * 1000)
        assert Reader(senders[0]).read()[0] == 200
    assert is_served(site)


@pytest.mark.parametrize(
    "data", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"]
)
def test_request_that_never_ends_is_408_however_it_trickles(site: Site, data: bytes) -> None:
    with site.connect() as connection:
        connection.sendall(data)
        begun_s = time.monotonic()
        status, headers, body = Reader(connection).read()
        assert (status, headers["connection"]) == (408, "close")
        assert "not complete after 1 s" in json.loads(body)["error"]
        assert time.monotonic() - begun_s < 3


def test_silent_connection_is_closed(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(GET % 1)
        answers = Reader(connection)
        assert answers.read()[0] == 200
        assert answers.is_at_end()


def test_client_that_does_not_read_is_dropped(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        assert is_served(site)
        wait_until(lambda: not site.list_connections(), "the connection to be dropped")
    assert sum(request.head.target == b"/large" for request in site.requests) == 1


def test_there_is_room_for_more_connections_than_allowed_if_the_others_only_wait() -> None:
    limits = Limits(connections=10, request_s=20, linger_s=1, drain_s=1)
    with Site(limits) as site, contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(site.connect()).sendall(b"GET / HTTP/1.1\r\n")
        status, headers, body = ask(site, GET % 1)  # none of them has waited long enough yet
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert "too many connections" in json.loads(body)["error"]
        deadline_s = time.monotonic() + 10
        while ask(site, GET % 1)[0] != 200:
            assert time.monotonic() < deadline_s


def test_end_answers_what_has_begun_closes_what_waits_and_takes_nothing_new() -> None:
    with Site() as site, contextlib.ExitStack() as stack:
        idle, asking, sending = (stack.enter_context(site.connect()) for _ in range(3))
        idle.sendall(GET % 1)
        assert Reader(idle).read()[0] == 200
        sending.sendall(b"POST /s HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na")
        asking.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: site.held, "the request to arrive")
        site.stop()
        assert idle.recv(1) == b""
        with pytest.raises(ConnectionError):
            site.connect()
        sending.sendall(b"bc")
        status, headers, _ = Reader(sending).read()
        assert (status, headers["connection"]) == (200, "close")
        site.call(lambda: site.held[0].reply(Answer(b"{}")))
        assert Reader(asking).read()[0] == 200


def test_end_does_not_wait_for_ever() -> None:
    with Site() as site, site.connect() as asking:
        asking.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: site.held, "the request to arrive")
        begun_s = time.monotonic()
        site.stop()
        assert Reader(asking).is_at_end()
        assert time.monotonic() - begun_s < SMALL.drain_s + 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([GET % 1, b"POST / HTTP/1.1\r\n", b"Content-Length: 3\r\n", b"\r\n", b"abc", b"\0"])))
def test_no_order_of_parts_harms_the_server(site: Site, parts: list[bytes]) -> None:
    with site.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"".join(parts))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert is_served(site)
