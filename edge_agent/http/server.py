"""Listens on sockets that are bound before anything starts, and ends what takes too long."""

import asyncio
import contextlib
import logging
import socket
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_agent.http.connection import Connection, Request
from edge_agent.http.listener import Limits, Listener
from models.contract.settings import SettingsError

log = logging.getLogger(__name__)

UDS_MODE = 0o660  # the service's user, and the group whose members may hand in samples
_BACKLOG = 128
_SWEEP_S = 1.0
_DRAIN_POLL_S = 0.02


def bind_sockets(host: str, port: int, uds_path: Path | None) -> list[socket.socket]:
    """Return a TCP socket and, if it has a path, a Unix socket, bound.

    Raises:
        SettingsError: An address is taken or cannot be had; the message names it.
    """
    tcp = _bind_tcp(host, port)
    try:
        return [tcp] if uds_path is None else [tcp, _bind_uds(uds_path)]
    except BaseException:
        tcp.close()
        raise


class HttpServer:
    """One server for all sockets; `serve` ends, drained, after `stop`."""

    def __init__(
        self, handle: Callable[[Request], None], sockets: Sequence[socket.socket], limits: Limits | None = None
    ) -> None:
        """Prepare to answer.

        Args:
            handle: Answers a request, now or later; never raises.
            sockets: Bound; what comes over a Unix socket is local.
            limits: What callers may take.
        """
        self._limits = limits or Limits()
        self._listeners = [
            (each, Listener(handle=handle, limits=self._limits, is_local=each.family == socket.AF_UNIX))
            for each in sockets
        ]
        self._listening = asyncio.Event()
        self._stopped = asyncio.Event()

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._stopped.is_set()

    async def serve(self) -> None:
        """Answer until stopped; requests that have begun are answered first."""
        servers = [await _listen(bound, listener) for bound, listener in self._listeners]
        sweeping = asyncio.create_task(self._sweep())
        self._listening.set()
        try:
            await self._stopped.wait()
        finally:
            for server in servers:
                server.close()
            await self._drain()
            sweeping.cancel()

    async def wait_listening(self) -> None:
        """Return once all sockets take connections."""
        await self._listening.wait()

    def stop(self) -> None:
        self._stopped.set()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            date = time.strftime("date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime()).encode()
            for _, listener in self._listeners:
                listener.date = date
                for connection in tuple(listener.connections):
                    connection.sweep(loop.time())
            await asyncio.sleep(min(_SWEEP_S, self._limits.request_s / 4))

    async def _drain(self) -> None:
        listeners = [listener for _, listener in self._listeners]
        for listener in listeners:
            listener.is_draining = True
            for connection in tuple(listener.connections):
                connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                while any(listener.connections for listener in listeners):  # noqa: ASYNC110 - seconds, once in a life
                    await asyncio.sleep(_DRAIN_POLL_S)
        for listener in listeners:
            for connection in tuple(listener.connections):
                connection.abort()


async def _listen(bound: socket.socket, listener: Listener[Request]) -> asyncio.Server:
    loop = asyncio.get_running_loop()

    def connect() -> Connection:
        return Connection(listener, loop)

    if listener.is_local:
        return await loop.create_unix_server(connect, sock=bound, backlog=_BACKLOG)
    return await loop.create_server(connect, sock=bound, backlog=_BACKLOG)


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        tcp = socket.socket(family, kind, protocol)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind(address)
            tcp.listen(_BACKLOG)  # or a second agent could bind too, before this one begins to serve
        except BaseException:
            tcp.close()
            raise
    except OSError as error:
        raise SettingsError(f"http.port: {host}:{port}: {error.strerror or error}") from error
    return tcp


def _bind_uds(path: Path) -> socket.socket:
    uds = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            _remove_stale(path)
        uds.bind(str(path))
        path.chmod(UDS_MODE)
        uds.listen(_BACKLOG)
    except OSError as error:
        uds.close()
        raise SettingsError(f"http.uds: {path}: {error.strerror or error}") from error
    return uds


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # left by a process that was killed
            path.unlink()
        else:
            raise SettingsError(f"http.uds: {path}: another agent answers there")
