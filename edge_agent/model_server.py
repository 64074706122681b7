"""What answers, and what is measured of it: the part that the device service and `edge-agent serve` share."""

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.errors import StalledError
from edge_agent.http.app import App
from edge_agent.http.server import HttpServer
from edge_agent.inference.engine import Engine, Rivalry
from edge_agent.inference.memory import give_back
from edge_agent.inference.model import load_manifest, load_model
from edge_agent.monitor.latency import LatencyHistogram
from edge_agent.monitor.metrics import build_metrics
from edge_agent.monitor.telemetry import read_rss_mb
from models.contract.manifest import ModelManifest
from models.contract.settings import SettingsError

if TYPE_CHECKING:
    from edge_agent.rpc.server import GrpcServer

_SWITCH_INTERVAL_S = 0.0005  # a tenth of Python's: a request waits that long for a thread that computes


class ModelServer:
    """The versions of one model behind one API.

    Attributes:
        failures: Inference requests refused so far.
    """

    def __init__(self, name: str, *, load_again: Callable[[], None] | None = None) -> None:
        self.engine = Engine(name, load_again=load_again)
        self.latencies = LatencyHistogram()
        self.failures = 0

    def adopt(self, directory: Path, manifest: ModelManifest) -> None:
        """Load a verified version and answer with it from now on; blocks, and may run on any thread.

        Raises:
            StalledError: It does not load or run; what answered before answers on.
        """
        self.engine.activate(load_model(directory, manifest))
        give_back()

    def challenge(self, directory: Path, *, weight: float, shadow: bool) -> None:
        """Set the version in `directory` beside the champion, or give the one that is there another split; blocks.

        Raises:
            StalledError: It is no version of this model, or does not load or run.
            MalformedError: It has no manifest.
        """
        manifest = load_manifest(directory)
        if manifest.model != self.engine.name:
            raise StalledError(f"{directory}: a version of {manifest.model!r}, expected one of {self.engine.name!r}")
        rivalry = self.engine.rivalry
        if rivalry is not None and rivalry.model.manifest == manifest:
            model = rivalry.model
        else:
            model = load_model(directory, manifest)
        self.engine.challenge(Rivalry(model=model, weight=weight, shadow=shadow))

    def end_challenge(self) -> None:
        """Let the champion answer alone."""
        self.engine.challenge(None)
        give_back()

    def find_challenger(self) -> int | None:
        """Return which version stands beside the champion, if one does."""
        others = self.engine.list_models()[1:]
        return others[0].manifest.version if others else None

    def count_failure(self) -> None:
        self.failures += 1

    def build_metrics(self) -> str:
        """Return everything measured here as Prometheus text."""
        return build_metrics(
            latencies=self.latencies.snapshot(),
            sum_s=self.latencies.sum_s,
            failures=self.failures,
            rss_mb=read_rss_mb(),
            model=self.engine.name,
            versions=[(model.manifest.version, model.statistics.snapshot()) for model in self.engine.list_models()],
            comparison=self.engine.snapshot_shadow(),
        )

    @contextlib.asynccontextmanager
    async def answer(
        self,
        app: App,
        sockets: Sequence[socket.socket],
        *,
        on_end: Callable[[], None],
        grpc_address: tuple[str, int] | None = None,
    ) -> AsyncIterator[None]:
        """Answer on `sockets` within the context; requests under way at its end are answered first.

        Args:
            app: What answers.
            sockets: Bound.
            on_end: Called when the server has ended, whatever the reason.
            grpc_address: Host and port on which the same is answered over gRPC, if it is.

        Raises:
            SettingsError: There is no gRPC here, or its address cannot be had.
        """
        grpc_server = None if grpc_address is None else _bind_grpc(app, *grpc_address)
        server = HttpServer(app.handle, sockets)
        serving = asyncio.create_task(server.serve())
        serving.add_done_callback(lambda _task: on_end())
        await server.wait_listening()
        if grpc_server is not None:
            await grpc_server.start()
        _prefer_the_loop()
        try:
            yield
        finally:
            app.drain()
            server.stop()
            if grpc_server is not None:
                await grpc_server.stop()
            await serving


def _bind_grpc(app: App, host: str, port: int) -> "GrpcServer":
    os.environ["GRPC_VERBOSITY"] = "NONE"  # what its log would say, callers and our own say
    try:
        from edge_agent.rpc.server import GrpcServer  # 15 MB that only who turns it on pays for
    except ImportError as error:
        raise SettingsError(f"gRPC needs `pip install 'edge-fl[grpc]'`: {error}") from error
    return GrpcServer(app, host, port)


def _prefer_the_loop() -> None:
    """Keep other threads, and the collector, from holding up answers while a version changes."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.freeze()  # what is imported stays: no later collection walks through it
