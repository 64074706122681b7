"""HTTP/1.1 as the agent speaks it: one connection, an `asyncio.Protocol` over httptools' parser.

Requests of a connection are answered one at a time and in order; those sent ahead wait, and reading with them.
Whatever cannot be read as a request ends the connection after a last answer, which the client has time to read.
"""

import asyncio
from collections import deque
from http import HTTPStatus
from typing import Final, cast

import httptools

from edge_agent.errors import RequestError
from edge_agent.http.answers import Answer, answer_error
from edge_agent.http.listener import HEAD_END, Head, Listener

_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_CLOSE: Final = b"connection: close\r\n"
_KEEP: Final = b"connection: keep-alive\r\n"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Request:
    """One request, whole; it is answered once."""

    __slots__ = ("_connection", "body", "head", "is_alone", "is_local")

    def __init__(
        self, connection: "Connection", head: Head, body: bytes | bytearray, *, is_alone: bool = False
    ) -> None:
        self._connection = connection
        self.is_local = connection.is_local
        self.is_alone = is_alone  # nobody else is connected: no other request can come in this turn of the loop
        self.head = head
        self.body = body

    def reply(self, answer: Answer) -> None:
        """Send the answer, unless the client has gone."""
        self._connection.finish(self, answer)


class Connection(asyncio.Protocol):
    """One client; made by the listening server."""

    __slots__ = (
        "_advancing",
        "_asked",
        "_body",
        "_body_bytes",
        "_data",
        "_ended",
        "_expects",
        "_head_bytes",
        "_headers",
        "_in_head",
        "_is_first",
        "_last",
        "_limits",
        "_lingering",
        "_listener",
        "_loop",
        "_parser",
        "_paused",
        "_queue",
        "_receiving",
        "_stray_bytes",
        "_stuck",
        "_target",
        "_transport",
        "is_local",
        "since_s",
    )

    def __init__(self, listener: "Listener[Request]", loop: asyncio.AbstractEventLoop) -> None:
        self._listener, self._limits, self._loop = listener, listener.limits, loop
        self.is_local = listener.is_local
        self.since_s = loop.time()
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()  # read ahead of the one being answered
        self._asked: Request | None = None  # is being answered
        self._receiving = False  # a request has begun and is not whole
        self._ended = False  # nothing more is read as a request
        self._lingering = self._paused = self._stuck = self._advancing = self._expects = False
        self._last: Answer | None = None  # what ends the connection, after the answers that are due
        self._in_head = self._is_first = False
        self._data = self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._head_bytes = self._body_bytes = self._stray_bytes = 0

    @property
    def is_waiting(self) -> bool:
        """Whether nothing is being answered."""
        return self._asked is None and not self._queue

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._listener.admits(self.since_s):
            self._listener.connections.add(self)
        else:
            self._ended = True
            self._write(answer_error(RequestError("too many connections", status=503)), closes=True)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        self._ended = True
        self._drop_body()
        self._queue.clear()
        self._listener.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if not (self._receiving or self._stuck) and self._asked is None:  # then nothing is queued or paused either
            end = data.find(HEAD_END) + len(HEAD_END)
            head = self._listener.heads.get(data[:end])
            if head is not None and head.body_bytes == len(data) - end:
                self.since_s = self._loop.time()
                self._start(Request(self, head, data[end:], is_alone=len(self._listener.connections) == 1))
                return
        self._read(data)

    def eof_received(self) -> bool:
        self._ended = True
        return not self.is_waiting  # what is due is still sent

    def pause_writing(self) -> None:
        self._stuck = True
        self.since_s = self._loop.time()
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._stuck = False
        self.since_s = self._loop.time()
        self._advance()

    # What the parser says

    def on_message_begin(self) -> None:
        self._receiving = self._in_head = True
        self._target = b""
        self._headers = {}
        self._head_bytes, self._stray_bytes = 0, -len(self._data)
        self.since_s = self._loop.time()

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # trailers say nothing that matters here
            return
        self._head_bytes += len(name) + len(value)
        name = name.lower()
        if name == b"host" and name in self._headers:
            self._refuse(RequestError("expected one header Host, got two"), stop=True)
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        headers, limits = self._headers, self._limits
        if self._head_bytes + len(self._target) > limits.head_bytes or len(headers) > limits.headers:
            self._refuse(self._build_long_head(), stop=True)
        if int(headers.get(b"content-length", 0)) > limits.body_bytes:
            self._refuse(self._build_long_body(), stop=True)
        if b"expect" in headers:
            if headers[b"expect"].lower() != b"100-continue":
                self._refuse(RequestError("header Expect: expected 100-continue", status=417), stop=True)
            self._expects = True
            if self.is_waiting:
                self._invite()

    def on_body(self, part: bytes) -> None:
        self._body_bytes += len(part)
        self._listener.buffered_bytes += len(part)
        if self._body_bytes > self._limits.body_bytes:
            self._refuse(self._build_long_body(), stop=True)
        if self._listener.buffered_bytes > self._limits.bodies_bytes:
            self._refuse(RequestError("too many long bodies are under way", status=503), stop=True)
        if not self._body:
            self._body = part
        elif isinstance(self._body, bytearray):
            self._body += part
        else:
            self._body = bytearray(self._body)
            self._body += part

    def on_message_complete(self) -> None:
        self._receiving = self._expects = False
        if self._ended:
            return
        parser, body = self._parser, self._body
        if not parser.should_keep_alive() or parser.should_upgrade():
            self._ended = True  # and what follows this request is not read
        head = Head(parser.get_method(), self._target, self._headers)
        if self._is_first and not self._ended:
            self._listener.remember(self._data, head)
        self._is_first = False
        request = Request(self, head, body)
        self._drop_body()
        if self._asked is not None or self._queue or self._stuck:
            self._queue.append(request)
        else:
            self._start(request)

    # Answers

    def finish(self, request: Request, answer: Answer) -> None:
        """Send the answer to the request that is being answered, and go on to the next one."""
        if request is not self._asked:  # it has been answered
            return
        self._asked = None
        if self._transport.is_closing():
            return
        is_last = self._ended or (self._listener.is_draining and not self._receiving)
        closes = is_last and not self._queue and self._last is None
        self.since_s = self._loop.time()
        self._write(answer, closes=closes, request=request)
        if closes:
            self._transport.close()
        elif not self._advancing:
            self._advance()

    def sweep(self, now_s: float) -> None:
        """End what has taken too long."""
        waited_s, limits = now_s - self.since_s, self._limits
        if self._lingering or self._stuck:
            if waited_s > (limits.linger_s if self._lingering else limits.write_s):
                self.abort()
        elif not self.is_waiting:
            return
        elif self._receiving:
            if waited_s > limits.request_s:
                self._refuse(RequestError(f"the request was not complete after {limits.request_s:g} s", status=408))
        elif waited_s > limits.keep_alive_s:
            self._transport.close()

    def drain(self) -> None:
        """Close once nothing is under way."""
        if self.is_waiting and not self._receiving:
            self._transport.close()

    def abort(self) -> None:
        self._ended = True
        self._listener.connections.discard(self)
        self._transport.abort()

    def _read(self, data: bytes) -> None:
        self._data, body_bytes = data, self._body_bytes
        self._is_first = not self._receiving
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._ended = True
        except httptools.HttpParserError as error:
            if not self._ended:
                self._refuse(RequestError(f"expected a request of HTTP/1.1: {error}"))
        finally:
            self._data = b""
        if self._receiving and self._body_bytes == body_bytes:
            # The parser keeps what is not a whole header or trailer yet.
            self._stray_bytes += len(data)
            if self._stray_bytes > self._limits.head_bytes and not self._ended:
                self._refuse(self._build_long_head())
        if self._queue and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _start(self, request: Request) -> None:
        self._asked = request
        self._listener.handle(request)

    def _advance(self) -> None:
        self._advancing = True
        while self._queue and self._asked is None and not self._stuck:
            self._start(self._queue.popleft())
        self._advancing = False
        if self._stuck or not self.is_waiting:
            return
        if self._last is not None:
            self._say_last()
        elif self._expects:
            self._invite()
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _invite(self) -> None:
        self._expects = False
        if not self._body_bytes:
            self._transport.write(_CONTINUE)

    def _refuse(self, error: RequestError, *, stop: bool = False) -> None:
        """End the connection with `error`, after the answers that are due.

        Args:
            error: What was wrong.
            stop: Whether a callback of the parser asks, which then goes no further.
        """
        self._ended, self._receiving = True, False
        self._drop_body()
        self._last = answer_error(error)
        if self.is_waiting and not self._stuck:
            self._say_last()
        if stop:
            raise error

    def _say_last(self) -> None:
        assert self._last is not None
        if self._lingering or self._transport.is_closing():
            return
        self._lingering = True
        self.since_s = self._loop.time()
        self._write(self._last, closes=True)
        self._transport.write_eof()  # and what still comes is read and dropped, or a reset would overtake the answer

    def _write(self, answer: Answer, *, closes: bool, request: Request | None = None) -> None:
        if closes:
            stays = _CLOSE
        elif request is not None and request.head.says_keep_alive:
            stays = _KEEP  # HTTP/1.0 does not take it for granted
        else:
            stays = b""
        status, body = answer.status, answer.body
        self._transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b%b\r\n%b"
            % (
                status,
                _REASONS[status],
                answer.content_type,
                len(body),
                self._listener.date,
                answer.headers,
                stays,
                b"" if request is not None and request.head.method == b"HEAD" else body,
            )
        )

    def _drop_body(self) -> None:
        self._listener.buffered_bytes -= self._body_bytes
        self._body, self._body_bytes = b"", 0

    def _build_long_head(self) -> RequestError:
        limits = self._limits
        return RequestError(
            f"expected at most {limits.headers} headers, {limits.head_bytes} bytes with the request line", status=431
        )

    def _build_long_body(self) -> RequestError:
        return RequestError(f"expected a body of at most {self._limits.body_bytes} bytes", status=413)
