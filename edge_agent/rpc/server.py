"""The gRPC server: what it listens on and what callers may take of it.

Who it was called as (`:authority`) is not looked at: gRPC does not say, and a web page, which DNS rebinding could bring
here, cannot speak HTTP/2 without TLS.
"""

import asyncio
import ipaddress
from typing import Final

import grpc

from edge_agent.http.app import App
from edge_agent.http.inference import WAITING_MAX
from edge_agent.http.listener import Limits
from edge_agent.rpc.service import SERVICE, GrpcService
from models.contract.settings import SettingsError

_FAREWELL_S: Final = 0.25  # gRPC breaks off what arrives while it shuts down; until then callers are told so
CONNECTIONS_MAX: Final = 64  # each serves many requests at once
_IDENTITY_ONLY: Final = 1 << 0  # of the compression algorithms: nothing is unpacked, as over HTTP


class GrpcServer:
    """Answers for `app` between `start` and `stop`."""

    def __init__(self, app: App, host: str, port: int, limits: Limits | None = None) -> None:
        """Bind; to be called on the event loop.

        Raises:
            SettingsError: The address cannot be had, or is none of this machine's alone while nobody could show a token.
        """
        self._limits = limits or Limits()
        if not app.guard.has_token and not _is_loopback(host):
            raise SettingsError(f"grpc: {host} is not the loopback, and there is no token that callers could show")
        self._server = grpc.aio.server(options=_build_options(self._limits), maximum_concurrent_rpcs=WAITING_MAX)
        handlers = GrpcService(app, self._limits).handlers
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise SettingsError(f"grpc.port: {host}:{port}: the address is taken or cannot be had") from error

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        """Return when what has begun is answered; nothing new is taken meanwhile, if `app` is draining."""
        await asyncio.sleep(_FAREWELL_S)
        await self._server.stop(self._limits.drain_s)


def _build_options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # or a second agent could bind, too
        ("grpc.max_receive_message_length", limits.body_bytes),
        ("grpc.max_metadata_size", limits.head_bytes),
        ("grpc.max_concurrent_streams", WAITING_MAX),
        ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
        ("grpc.http2.bdp_probe", 0),  # or it takes in megabytes of messages that nobody has begun to read
        ("grpc.max_connection_idle_ms", int(limits.keep_alive_s * 1000)),
        ("grpc.server_handshake_timeout_ms", int(limits.request_s * 1000)),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
