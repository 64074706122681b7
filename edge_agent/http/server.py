"""Serves the local API with uvicorn: one loop, a TCP and a Unix socket that are bound before anything starts."""

import asyncio
import contextlib
import logging
import socket
import stat
from collections.abc import Generator, Sequence
from pathlib import Path

import uvicorn

from edge_agent.http.app import App
from models.contract.settings import SettingsError

log = logging.getLogger(__name__)

UDS_MODE = 0o660  # the service's user, and the group whose members may hand in samples
_CONNECTIONS_MAX = 512  # the next one is answered 503; one costs about 20 kB
_BACKLOG = 128
_KEEP_ALIVE_S = 75  # as nginx; integrators keep a pool of connections
_DRAIN_TIMEOUT_S = 10  # systemd's 90 s, with room for the rest of the agent


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

    def __init__(self, app: App, sockets: Sequence[socket.socket]) -> None:
        self._sockets = list(sockets)
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                limit_concurrency=_CONNECTIONS_MAX,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_DRAIN_TIMEOUT_S,
            )
        )

    async def serve(self) -> None:
        """Answer until stopped; requests that have begun are answered first."""
        await self._server.serve(self._sockets)

    async def wait_listening(self) -> None:
        """Return once both sockets take connections."""
        await self._server.listening.wait()

    def stop(self) -> None:
        self._server.should_exit = True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are the agent's, which has more to end than this server


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
