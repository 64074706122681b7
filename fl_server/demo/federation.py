"""A whole federation on this machine: broker, coordinator and devices, each a process of its own.

Made by the same commands an operator types; everything lies below one folder.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import numpy as np
import numpy.typing as npt

from fl_server.demo.processes import Child, find_free_ports, find_mosquitto, run_command
from fl_server.errors import ServerError

START_TIMEOUT_S = 60.0

Array = npt.NDArray[np.float32] | npt.NDArray[np.int64]


class LocalDevice:
    """One device's bundle, its data and its agent process."""

    def __init__(self, device_id: str, directory: Path, port: int, socket_path: Path) -> None:
        self.device_id, self.port, self.socket_path = device_id, port, socket_path
        self.config_path = directory / "edge-agent.toml"
        self.log_path = directory.parent.parent / "logs" / f"{device_id}.log"
        self.agent: Child | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "EDGE_AGENT_HTTP__PORT": str(self.port),
            "EDGE_AGENT_HTTP__UDS": str(self.socket_path),
            "EDGE_AGENT_TELEMETRY__INTERVAL_S": "5",
        }

    def start(self) -> Child:
        self.agent = Child(
            self.device_id,
            [sys.executable, "-m", "edge_agent", "run", "--config", str(self.config_path)],
            log_path=self.log_path,
            environment=self.environment,
        )
        return self.agent

    def get_version(self, model: str) -> int | None:
        """Return the version that answers here; None without one."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.port}/v2/models/{model}", timeout=2.0)
        except httpx.HTTPError:
            return None
        return int(answer.json()["versions"][0]) if answer.is_success else None

    def ingest(self, x: Array, y: Array) -> None:
        """Give the device samples of its own, through its own command."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.npz"
            np.savez(path, x=x, y=y)
            arguments = ["edge_agent", "ingest", str(path), "--config", str(self.config_path)]
            run_command(f"ingest into {self.device_id}", arguments, environment=self.environment)


class LocalFederation:
    """Broker, coordinator and devices below `directory`; a context that ends every process it started."""

    def __init__(self, directory: Path, *, definition: str, model: str, validation: tuple[Array, Array]) -> None:
        self.directory, self.model = directory, model
        self.server_dir, self.logs_dir = directory / "server", directory / "logs"
        self.config_path = self.server_dir / "fl-server.toml"
        self.devices: list[LocalDevice] = []
        self.broker: Child | None = None
        self.coordinator: Child | None = None
        self._definition, self._validation = definition, validation
        self._stack = ExitStack()
        self._broker_port, superlink_port = find_free_ports(2)
        self._environment = {
            "FL_SERVER_PROXY__USED": "false",
            "FL_SERVER_SUPERLINK__PORT": str(superlink_port),
        }

    def __enter__(self) -> Self:
        # A socket's path is limited to 107 bytes, whatever folder the user chose.
        self._sockets_dir = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-fl-")))
        self.logs_dir.mkdir(parents=True)
        self.fl_server("init", str(self.server_dir), "--fleet", "demo", "--broker-port", str(self._broker_port))
        x, y = self._validation
        np.savez(self.server_dir / "validation.npz", x=x, y=y)
        with self.config_path.open("a") as file:
            file.write(f'\n[models.{self.model}]\ndefinition = "{self._definition}"\nvalidation = "validation.npz"\n')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = [device.agent for device in self.devices] + [self.coordinator, self.broker]
        with ThreadPoolExecutor(max_workers=len(children)) as pool:
            list(pool.map(lambda child: child and child.stop(), children[:-1]))
        if self.broker:
            self.broker.stop()
        self._stack.close()

    def fl_server(self, *arguments: str) -> str:
        """Run an operator's command against this federation and return what it printed."""
        config = [] if arguments[0] == "init" else ["--config", str(self.config_path)]
        return run_command(
            f"fl-server {arguments[0]}", ["fl_server", *arguments, *config], environment=self._environment
        )

    def fl_server_command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """Return the argument list and environment of an operator's command, for a caller that follows its output."""
        return [sys.executable, "-m", "fl_server", *arguments, "--config", str(self.config_path)], self._environment

    def enroll(self, count: int) -> None:
        """Enrol `device-1` to `device-{count}`, each with a bundle of its own."""
        ports = find_free_ports(count)
        for number, port in enumerate(ports, 1):
            device_id = f"device-{number}"
            directory = self.directory / "devices" / device_id
            self.devices.append(LocalDevice(device_id, directory, port, self._sockets_dir / f"{number}.sock"))
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(self._enroll_one, self.devices))

    def start_broker(self) -> Child:
        command = [find_mosquitto(), "-c", "broker/mosquitto.conf"]  # as `fl-server init` wrote it
        self.broker = Child("broker", command, log_path=self.logs_dir / "broker.log", cwd=self.server_dir)
        return self.broker

    def start_coordinator(self) -> Child:
        command, environment = self.fl_server_command("run")
        self.coordinator = Child(
            "coordinator", command, log_path=self.logs_dir / "coordinator.log", environment=environment
        )
        return self.coordinator

    def start_devices(self) -> None:
        for device in self.devices:
            device.start()

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return once `condition` holds.

        Raises:
            ServerError: A process ended meanwhile, or it took longer than `timeout_s`.
        """
        ends = time.monotonic() + timeout_s
        while not condition():
            self.check_alive()
            if time.monotonic() > ends:
                raise ServerError(f"after {timeout_s:.0f} s still waiting for {what}; logs are in {self.logs_dir}")
            time.sleep(0.1)

    def check_alive(self) -> None:
        """Raise ServerError if a process has ended by itself."""
        for child in self._children():
            child.check_alive()

    def all_serve(self, version: int) -> bool:
        """Return whether every device answers with `version`."""
        return all(device.get_version(self.model) == version for device in self.devices)

    def _children(self) -> Sequence[Child]:
        return [child for child in [self.broker, self.coordinator, *(d.agent for d in self.devices)] if child]

    def _enroll_one(self, device: LocalDevice) -> None:
        out = str(device.config_path.parent)
        self.fl_server("enroll", device.device_id, "--model", self.model, "--out", out)
