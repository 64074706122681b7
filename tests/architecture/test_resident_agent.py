"""Serving needs no training stack: the resident agent lives where torch, flwr and safetensors cannot be imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.simulators.agent import AgentProcess, find_free_port, install_version
from tests.simulators.tiny_models import save_version
from tests.simulators.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
BLOCKED = ("torch", "flwr", "safetensors", "opacus", "grpc", "onnx", "pydantic")
PRELUDE = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # importing it raises ImportError
"""


def start(arguments: list[str], stderr: int | None = None) -> subprocess.Popen[str]:
    code = f"{PRELUDE}\nfrom edge_agent.__main__ import main\nsys.exit(main({arguments!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=stderr,
        text=True,
    )


def test_agent_serves_with_the_training_stack_blocked(tmp_path: Path) -> None:
    device = AgentProcess(tmp_path)
    device.state_dir.mkdir()
    install_version(device.state_dir)
    process = start(["run", "--config", str(device.config_path)])

    def is_ready() -> bool:
        assert process.poll() is None, "the agent has ended"
        try:
            return httpx.get(f"{device.url}/v2/health/ready").is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, "the agent to serve")
        asking = start(["status", "--uds", str(device.uds_path)])
        assert asking.wait(30) == 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    "module",
    ["edge_agent.agent", "edge_agent.updates.fetcher", "edge_agent.link.commands", "edge_agent.training.ledger"],
)
def test_what_the_agent_may_import_later_is_free_of_the_training_stack(module: str) -> None:
    code = f"{PRELUDE}\nimport {module}\nassert not [name for name in {BLOCKED!r} if sys.modules.get(name)]"
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True
    )


def test_grpc_that_is_not_installed_is_one_line_about_its_extra(tmp_path: Path) -> None:
    save_version(tmp_path / "v")
    addresses = ["--http", f"127.0.0.1:{find_free_port()}", "--grpc", f"127.0.0.1:{find_free_port()}"]
    process = start(["serve", str(tmp_path / "v"), *addresses], stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith("edge-agent: gRPC needs `pip install 'edge-fl[grpc]'`")


def test_signing_libraries_stay_out_of_the_resident_process() -> None:
    code = (
        "import sys, edge_agent.agent, edge_agent.updates.verifier; "
        "assert not {'tuf', 'cryptography', 'uvicorn'} & set(sys.modules) and 'asyncio' in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True
    )
