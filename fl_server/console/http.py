"""A small HTTPS server on the loopback, behind the proxy: one request a connection, bounded in size, time and number."""

import asyncio
import contextlib
import logging
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

logger = logging.getLogger(__name__)

HEAD_MAX_BYTES = 16 * 1024
BODY_MAX_BYTES = 16 * 1024
DEADLINE_S = 10.0  # for a whole request
CONNECTIONS_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; the names of `headers` are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is answered, JSON."""

    status: HTTPStatus
    body: bytes = b"{}"


class _BadRequestError(Exception):
    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class _Door:
    def __init__(self, decide: Callable[[Request], Answer]) -> None:
        self._decide = decide
        self._open = 0

    async def take(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(DEADLINE_S):
                writer.write(_build(await self._answer(reader)))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            logger.debug("a request was not heard to its end")
        except Exception:
            logger.exception("a request could not be answered")
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: StreamReader) -> Answer:
        if self._open > CONNECTIONS_MAX:
            return Answer(status=HTTPStatus.SERVICE_UNAVAILABLE)
        try:
            return self._decide(await _read(reader))
        except _BadRequestError as error:
            return Answer(status=error.status)


@asynccontextmanager
async def answering(port: int, context: ssl.SSLContext, decide: Callable[[Request], Answer]) -> AsyncIterator[None]:
    """Answer requests at `port` of the loopback while the block lasts.

    Args:
        port: To listen on.
        context: With the server's certificate.
        decide: Called on the loop with each request; returns within milliseconds.

    Raises:
        OSError: The port is taken.
    """
    server = await asyncio.start_server(
        _Door(decide).take, "127.0.0.1", port, ssl=context, limit=HEAD_MAX_BYTES, ssl_handshake_timeout=DEADLINE_S
    )
    async with server:
        yield


async def _read(reader: StreamReader) -> Request:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise _BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from error
    line, *fields = head.decode("latin-1").split("\r\n")[:-2]
    parts = line.split(" ")
    if len(parts) != 3:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST)
    headers = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdecimal()):
        raise _BadRequestError(HTTPStatus.BAD_REQUEST)
    if len(length) > 9 or int(length) > BODY_MAX_BYTES:
        raise _BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    return Request(method=parts[0], path=parts[1], headers=headers, body=await reader.readexactly(int(length)))


def _build(answer: Answer) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + answer.body
