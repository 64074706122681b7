"""What callers may take of this process, and what the connections of one listening socket share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

Asked = TypeVar("Asked")

HEAD_END: Final = b"\r\n\r\n"
_HEADS_MAX = 64
_SAYS_MORE: Final = frozenset({b"expect", b"transfer-encoding"})  # of the body than its length
_KNOWN_HEAD_MAX_BYTES = 1024
_FRESH_S = 1.0  # a connection younger than this is not closed to make room for another


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What callers may take of this process.

    Attributes:
        body_bytes: Of one body; 1300 images of 28 x 28 as JSON.
        bodies_bytes: Of all bodies under way on one socket.
        head_bytes: Of a request line and its headers.
        headers: Of one request.
        connections: At once on one socket.
        request_s: For a whole request from its first byte; over a loopback or Unix socket 4 MiB take milliseconds.
        keep_alive_s: Between two requests, as nginx; integrators keep a pool of connections.
        write_s: For a client to take what it asked for.
        linger_s: For a client to read the last answer before its connection is reset.
        drain_s: For what is under way when the server stops; systemd gives the whole agent 90 s.
    """

    body_bytes: int = 4 * 1024 * 1024
    bodies_bytes: int = 32 * 1024 * 1024
    head_bytes: int = 16 * 1024
    headers: int = 64
    connections: int = 384
    request_s: float = 10.0
    keep_alive_s: float = 75.0
    write_s: float = 30.0
    linger_s: float = 2.0
    drain_s: float = 10.0


class Waiting(Protocol):
    """One connection, as its listener sees it."""

    since_s: float

    @property
    def is_waiting(self) -> bool: ...
    def abort(self) -> None: ...
    def drain(self) -> None: ...
    def sweep(self, now_s: float) -> None: ...


class Head:
    """A request line and its headers; it may be that of many requests, and does not change."""

    __slots__ = ("body_bytes", "headers", "method", "says_keep_alive", "target")

    def __init__(self, method: bytes, target: bytes, headers: Mapping[bytes, bytes]) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.says_keep_alive = headers.get(b"connection", b"").lower() == b"keep-alive"
        self.body_bytes = int(headers.get(b"content-length", 0))


@dataclass(slots=True, kw_only=True, eq=False)
class Listener(Generic[Asked]):
    """What the connections of one listening socket share.

    Attributes:
        handle: Answers a request, now or later.
        is_local: Whether they come over the Unix socket.
        date: Header line of every answer.
        buffered_bytes: Of bodies under way.
        heads: Of requests that came whole and in one piece, by their bytes: clients say the same again and again.
    """

    handle: Callable[[Asked], None]
    limits: Limits
    is_local: bool
    date: bytes = b""
    buffered_bytes: int = 0
    is_draining: bool = False
    connections: set[Waiting] = field(default_factory=set)
    heads: dict[bytes, Head] = field(default_factory=dict)

    def remember(self, data: bytes, head: Head) -> None:
        """Spare the parser the next request of this `head`, if `data` were it and its body, and nothing else."""
        end = data.find(HEAD_END) + len(HEAD_END)
        if end > _KNOWN_HEAD_MAX_BYTES or head.body_bytes != len(data) - end or not _SAYS_MORE.isdisjoint(head.headers):
            return
        if len(self.heads) >= _HEADS_MAX:
            self.heads.clear()
        self.heads[data[:end]] = head

    def admits(self, now_s: float) -> bool:
        """Return whether there is room for one more connection, if need be in place of one that only waits."""
        if len(self.connections) < self.limits.connections:
            return True
        waiting = (each for each in self.connections if each.is_waiting and now_s - each.since_s > _FRESH_S)
        oldest = min(waiting, key=lambda each: each.since_s, default=None)
        if oldest is None:
            return False
        oldest.abort()
        return True
