"""A real agent process, and how its state directory comes to hold a version."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from edge_agent.updates.slots import Slots
from models.contract.manifest import MANIFEST_NAME
from models.contract.terms import ProbationRules
from models.tensors.features import Feature
from tests.simulators.tiny_models import save_version
from tests.simulators.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
FLEET = "fleet-1"
DEVICE = "device-1"
MODEL = "tiny"


class AgentProcess:
    """`edge-agent run` on ports of its own; a context that ends it."""

    def __init__(self, directory: Path, *, broker_port: int = 1, extra: str = "") -> None:
        """Write a configuration.

        Args:
            directory: The device's own.
            broker_port: Where the broker is; nobody listens on the default.
            extra: More TOML.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.state_dir = directory / "state"
        self.uds_path = directory / "s"  # a socket's path is limited to 107 bytes
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config_path = directory / "edge-agent.toml"
        (directory / "root.json").write_text("{}")
        self.config_path.write_text(
            f'device_id = "{DEVICE}"\nfleet = "{FLEET}"\nmodel = "{MODEL}"\n'
            f'state_dir = "state"\ntuf_root_path = "root.json"\n'
            f'[http]\nport = {self.port}\nuds = "{self.uds_path}"\n[broker]\nport = {broker_port}\nkeepalive_s = 5\n{extra}'
        )
        self.log_path = directory / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", "run", "--config", str(self.config_path)],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stderr=log,
            )
        wait_until(self.is_live, "the agent to answer")

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def is_live(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_path.read_text()
        try:
            return httpx.get(f"{self.url}/v2/health/live").is_success
        except httpx.TransportError:
            return False

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request over the Unix socket."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.uds_path)), base_url="http://device") as client:
            return client.request(method, path, **options)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = self.ask("GET", "/v1/status").json()
        return document


def install_version(
    state_dir: Path, version: int = 1, *, trainable: bool = False, features: tuple[Feature, ...] = ()
) -> None:
    """Put a tiny version into a slot, as an update does."""
    slots = stage_version(state_dir, version, trainable=trainable, features=features)
    slots.begin_try()
    slots.commit()


def stage_version(
    state_dir: Path,
    version: int,
    *,
    graph: bytes | None = None,
    trainable: bool = False,
    features: tuple[Feature, ...] = (),
    rules: ProbationRules | None = None,
) -> Slots:
    """Put a tiny version into the idle slot, to be tried with the agent's next start."""
    source = state_dir.parent / f"version-{version}"
    manifest = save_version(source, version=version, graph=graph, trainable=trainable, features=features)
    names = {entry.digest: name for name, entry in manifest.files.items()}
    slots = Slots(state_dir / "slots")
    slots.stage(
        (source / MANIFEST_NAME).read_bytes(),
        manifest.files,
        lambda entry: iter([(source / names[entry.digest]).read_bytes()]),
        rules,
    )
    return slots


def find_free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
