"""A real `edge-agent serve`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.simulators.agent import find_free_port
from tests.simulators.waiting import wait_until


@contextmanager
def serving_version(directory: Path, log_path: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Serve the version in `directory` until the block ends; yields host:port and the process's id; `options` are more of them."""
    address = f"127.0.0.1:{find_free_port()}"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_agent", "serve", str(directory), "--http", address, *options], stderr=log
        )

    def is_ready() -> bool:
        assert process.poll() is None, log_path.read_text()
        try:
            return httpx.get(f"http://{address}/v2/health/ready").is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, "serve to be ready")
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(20)
