"""A real mosquitto on a free port, which can be killed and started again."""

import os
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from fl_server.authority import Authority
from fl_server.demo.processes import find_mosquitto
from fl_server.fleet.broker_files import save_broker_files

START_TIMEOUT_S = 10.0
_CONFIG = """\
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_packet_size 400000
"""


class Mosquitto:
    """A broker without persistence: what it retained is lost when it is killed."""

    def __init__(self, directory: Path) -> None:
        self._cwd, self._config_path, self._log_path = None, directory / "mosquitto.conf", directory / "mosquitto.log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        user = "user root\n" if os.geteuid() == 0 else ""  # else it drops to a user that may not read here
        self._config_path.write_text(_CONFIG.format(port=self.port) + user)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        with self._log_path.open("ab") as log:
            command = [find_mosquitto(), "-c", str(self._config_path)]
            self._process = subprocess.Popen(command, cwd=self._cwd, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, self._log_path.read_text()
            assert time.monotonic() < deadline, "mosquitto does not listen"
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill it and start it anew, without what it retained."""
        self.kill()
        self.start()

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class ClosedMosquitto(Mosquitto):
    """The broker of a federation, as shipped: certificates, access list, what `fl-server init` writes."""

    def __init__(self, directory: Path) -> None:
        """Make the federation's authority and broker in the folder `directory`, which is there already."""
        self.ca_dir, self.fleet = directory / "ca", "demo"
        self._cwd, self._config_path, self._log_path = directory, Path("broker/mosquitto.conf"), directory / "log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.authority = Authority.create(self.ca_dir, fleet=self.fleet)
        self.authority.issue_servers(["127.0.0.1"])
        self.authority.save_crl([])
        save_broker_files(directory / "broker", fleet=self.fleet, host="127.0.0.1", port=self.port)
        self._process = None

    @property
    def pid_path(self) -> Path:
        return self.ca_dir.parent / "broker" / "mosquitto.pid"
