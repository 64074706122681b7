"""`edge-agent serve`: one version folder over HTTP, with no broker and no federation."""

import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.simulators.hostile_models import build_greedy
from tests.simulators.tiny_models import save_version
from tests.simulators.waiting import wait_until

BODY = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve on a free port until the block ends; yields its URL and process."""
    port = find_free_port()
    command = [sys.executable, "-m", "edge_agent", "serve", *arguments, "--http", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            return httpx.get(f"{url}/v2/health/ready").is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, "serve to be ready")
        yield url, process
    finally:
        process.kill()
        process.communicate()


def run_to_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    address = [] if "--http" in arguments else ["--http", f"127.0.0.1:{find_free_port()}"]
    command = [sys.executable, "-m", "edge_agent", "serve", *arguments, *address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_version_answers_on_tcp_and_unix_socket_until_it_is_told_to_end(tmp_path: Path) -> None:
    save_version(tmp_path / "v", version=3)
    with tempfile.TemporaryDirectory(prefix="edge-") as folder:
        uds = Path(folder) / "s"
        with serving(str(tmp_path / "v"), "--uds", str(uds)) as (url, process):
            answer = httpx.post(f"{url}/v2/models/tiny/infer", json=BODY).json()
            assert answer["model_version"] == "3"
            assert answer["outputs"][0]["data"] == [30.0, 30.0, 30.0]
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds))) as local:
                assert local.post("http://x/v2/models/tiny/infer", json=BODY).json()["outputs"] == answer["outputs"]
            assert 'version="3"' in httpx.get(f"{url}/metrics").text
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert not uds.exists()


def test_shadow_challenger_answers_nobody(tmp_path: Path) -> None:
    save_version(tmp_path / "v1", version=1)
    save_version(tmp_path / "v2", version=2)
    with serving(str(tmp_path / "v1"), "--challenger", str(tmp_path / "v2"), "--shadow") as (url, _):
        versions = {httpx.post(f"{url}/v2/models/tiny/infer", json=BODY).json()["model_version"] for _ in range(20)}
        assert versions == {"1"}


def test_weighted_challenger_answers_its_share_and_a_key_keeps_its_side(tmp_path: Path) -> None:
    save_version(tmp_path / "v1", version=1)
    save_version(tmp_path / "v2", version=2)
    with serving(str(tmp_path / "v1"), "--challenger", str(tmp_path / "v2"), "--weight", "0.5") as (url, _):
        infer = f"{url}/v2/models/tiny/infer"
        by_key = {
            key: {httpx.post(infer, json=BODY, headers={"Edge-Key": key}).json()["model_version"] for _ in range(3)}
            for key in map(str, range(40))
        }
        assert all(len(versions) == 1 for versions in by_key.values())
        assert 5 < sum(versions == {"2"} for versions in by_key.values()) < 35
        index = httpx.post(f"{url}/v2/repository/index").json()
        assert [row["version"] for row in index] == ["1", "2"]


def test_what_cannot_be_served_is_one_line_and_exit_2(tmp_path: Path) -> None:
    save_version(tmp_path / "v")
    save_version(tmp_path / "altered")
    save_version(tmp_path / "greedy", graph=build_greedy())
    with (tmp_path / "altered" / "inference.onnx").open("ab") as graph:
        graph.write(b"\0")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, said in (
        ([str(tmp_path / "none")], "none"),
        ([str(tmp_path / "altered")], "inference.onnx"),
        ([str(tmp_path / "greedy")], "greedy"),
        ([str(tmp_path / "v"), "--challenger", str(tmp_path / "greedy")], "greedy"),
        ([str(tmp_path / "v"), "--http", f"127.0.0.1:{port}"], str(port)),
        ([str(tmp_path / "v"), "--grpc", f"127.0.0.1:{port}"], str(port)),
        ([str(tmp_path / "v"), "--grpc", f"0.0.0.0:{port}"], "not the loopback"),
    ):
        done = run_to_end(*arguments)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert said in done.stderr
    taken.close()


@pytest.mark.parametrize(
    "arguments", [["--weight", "2"], ["--weight", "0.5"], ["--http", "8080"], ["--weight", "0.1", "--shadow"]]
)
def test_bad_usage_is_exit_2(tmp_path: Path, arguments: list[str]) -> None:
    save_version(tmp_path / "v")
    assert run_to_end(str(tmp_path / "v"), *arguments).returncode == 2


def test_manifest_is_what_decides(tmp_path: Path) -> None:
    save_version(tmp_path / "v")
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_bytes())
    (tmp_path / "v" / "manifest.json").write_text(json.dumps(manifest | {"model": "../x"}))
    assert run_to_end(str(tmp_path / "v")).returncode == 2
