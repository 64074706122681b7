"""What must not stop the model from answering: a full disk, a stop request, a slow trainer."""

import json
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.simulators.agent import MODEL, AgentProcess, install_version, stage_version
from tests.simulators.hostile_models import build_endless, build_greedy
from tests.simulators.waiting import wait_until

INFER = f"/v2/models/{MODEL}/infer"
GOOD = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
ROOM_BYTES = 1024 * 1024


def build_device(tmp_path: Path) -> AgentProcess:
    device = AgentProcess(tmp_path)
    device.state_dir.mkdir()
    install_version(device.state_dir)
    return device


def limit_files(device: AgentProcess, size_bytes: int) -> None:
    """Let no file of the agent grow beyond `size_bytes`: its writes fail as on a full disk."""
    _, hard = resource.prlimit(device.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(device.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


@pytest.mark.parametrize("build", [build_greedy, build_endless], ids=["64 GB", "endless"])
def test_hostile_release_ends_in_a_child_while_the_model_answers(tmp_path: Path, build: Callable[[], bytes]) -> None:
    device = build_device(tmp_path)
    stage_version(device.state_dir, 2, graph=build())
    with device:
        wait_until(
            lambda: "rolled back and never tried again" in device.log_path.read_text(), "the trial", timeout_s=90
        )
        answer = httpx.post(device.url + INFER, json=GOOD)
        assert answer.json()["model_version"] == "1"
        assert "tried again: " in (log := device.log_path.read_text())
        assert "Traceback" not in log
        assert device.status()["version"] == 1
        assert device.status()["rss_mb"] < 300


def test_full_disk_refuses_samples_keeps_acknowledged_ones_and_answers(tmp_path: Path) -> None:
    samples = {"samples": [{"x": [0.1] * 500, "y": 1}] * 20}
    with build_device(tmp_path) as device:
        limit_files(device, ROOM_BYTES)
        acknowledged = 0
        while (answer := device.ask("POST", "/v1/samples", json=samples)).is_success:
            acknowledged += len(answer.json()["ids"])
        assert answer.status_code == 507
        assert "cannot be kept" in answer.json()["error"]
        assert acknowledged > 0
        assert httpx.post(device.url + INFER, json=GOOD).is_success
        assert device.status()["samples"] == acknowledged
        device.kill()
        device.start()
        assert device.status()["samples"] == acknowledged
        assert device.ask("POST", "/v1/samples", json=samples).is_success


def test_damaged_databases_do_not_keep_the_model_from_answering(tmp_path: Path) -> None:
    device = build_device(tmp_path)
    for name in ("samples.db", "outbox.db"):
        (device.state_dir / name).write_bytes(b"x" * 5000)
    with device:
        assert httpx.post(device.url + INFER, json=GOOD).is_success
        refused = device.ask("POST", "/v1/samples", json={"samples": [{"x": [1], "y": 0}]})
        assert refused.status_code == 507
        assert "samples.db" in refused.json()["error"]
        assert device.status()["samples"] is None
        assert "events wait in memory only" in device.log_path.read_text()


def test_request_under_way_is_answered_after_the_agent_was_told_to_stop(tmp_path: Path) -> None:
    body = json.dumps(GOOD).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with build_device(tmp_path) as device, socket.create_connection(("127.0.0.1", device.port), timeout=20) as asking:
        asking.sendall(head + body[:10])
        assert httpx.post(device.url + INFER, json=GOOD).is_success  # the agent has seen the first half by now
        assert device.process is not None
        device.process.send_signal(signal.SIGTERM)
        asking.sendall(body[10:])
        answer = b""
        while more := asking.recv(65536):
            answer += more
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"data":[10' in answer
        assert device.process.wait(20) == 0
