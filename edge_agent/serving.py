"""`edge-agent serve`: one version folder behind the local API, without broker, slots or federation."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent import __version__
from edge_agent.errors import AgentError, RequestError
from edge_agent.inference.sandbox import trying_in_copy
from models.contract.errors import ContractError
from models.contract.settings import SettingsError

if TYPE_CHECKING:
    from edge_agent.http.app import App
    from edge_agent.model_server import ModelServer
    from models.contract.manifest import ModelManifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to serve and where.

    Attributes:
        directory: Of the version.
        uds: A Unix socket beside TCP, if any.
        grpc: Host and port for gRPC, if any.
        challenger: Of a second version of the model.
        weight: The challenger's share of the answers.
        shadow: Whether it is compared instead.
    """

    directory: Path
    host: str
    port: int
    uds: Path | None = None
    grpc: tuple[str, int] | None = None
    challenger: Path | None = None
    weight: float = 0.0
    shadow: bool = False


def serve_version(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered first.

    Raises:
        SettingsError: A folder is no version that can be served, or an address is taken; nothing was started.
    """
    if options.challenger is None and (options.weight or options.shadow):
        raise SettingsError("--weight and --shadow are about a --challenger: name one")
    directories = [options.directory] if options.challenger is None else [options.directory, options.challenger]
    manifest = _prepare(options.directory)
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(trying_in_copy(directory)) for directory in directories]
        import uvloop  # this and what follows while the copies try the versions

        from edge_agent.http.server import bind_sockets

        sockets = bind_sockets(options.host, options.port, options.uds)
        for directory, wait in zip(directories, trials, strict=True):
            _check(directory, wait)
    server = _load(manifest, options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_answer(server, _build_app(server, options), sockets, options))


def _check(directory: Path, wait: Callable[[], None]) -> None:
    try:
        wait()
    except AgentError as error:
        raise SettingsError(f"{directory}: {error}") from error


def _prepare(directory: Path) -> "ModelManifest":
    """Return the manifest, and import what its version needs."""
    import edge_agent.model_server  # noqa: F401
    from edge_agent.inference.model import find_backend, load_manifest

    try:
        manifest = load_manifest(directory)
        find_backend(manifest.runtime)
    except (AgentError, ContractError) as error:
        raise SettingsError(str(error)) from error
    return manifest


def _load(manifest: "ModelManifest", options: ServeOptions) -> "ModelServer":
    from edge_agent.model_server import ModelServer

    try:
        server = ModelServer(manifest.model)
        server.adopt(options.directory, manifest)
        if options.challenger is not None:
            server.challenge(options.challenger, weight=options.weight, shadow=options.shadow)
    except (AgentError, ContractError) as error:
        raise SettingsError(str(error)) from error
    return server


async def _answer(server: "ModelServer", app: "App", sockets: Sequence[socket.socket], options: ServeOptions) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with server.answer(app, sockets, on_end=stopped.set, grpc_address=options.grpc):
        versions = " and ".join(model.version for model in server.engine.list_models())
        log.info("%s %s serves on %s:%d", server.engine.name, versions, options.host, options.port)
        await stopped.wait()
        log.info("stopping")
    if options.uds is not None:
        with contextlib.suppress(FileNotFoundError):
            options.uds.unlink()


def _build_app(server: "ModelServer", options: ServeOptions) -> "App":
    from edge_agent.http.app import App, Device

    device = Device(
        agent_version=__version__,
        models=server.engine,
        add_samples=_refuse("keeps no samples"),
        build_inputs=partial(_build_inputs, server),
        get_status=partial(_build_status, server),
        get_privacy=_refuse("trains nothing"),
        get_metrics=server.build_metrics,
        record_latency=server.latencies.record,
        record_failure=server.count_failure,
        add_feedback=_refuse("keeps no feedback"),
        forget=_refuse("keeps no samples"),
    )
    return App(device, host=options.host)


async def _build_status(server: "ModelServer") -> Mapping[str, Any]:
    return {"model": server.engine.name, "versions": [model.version for model in server.engine.list_models()]}


def _build_inputs(server: "ModelServer", rows: Sequence[Any]) -> Mapping[str, Any]:
    from edge_agent.collector import build_model_inputs

    if server.engine.active is None:
        raise RequestError("no version is loaded", status=503)
    return build_model_inputs(server.engine.active.manifest, rows)


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(*_arguments: object) -> Any:
        raise RequestError(f"`edge-agent serve` {what}: that is the device service's, `edge-agent run`", status=404)

    return refuse
