"""Servers under measurement: a process that is watched from its start, and how it is asked."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from tests.bench.load import Address, build_post
from tests.bench.versions import REPOSITORY, BenchVersion
from tests.simulators.agent import find_free_port

START_TIMEOUT_S = 60.0
_POLL_S = 0.002
_DATATYPES = {"float32": "FP32", "int64": "INT64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers.

    Attributes:
        start_s: From the start of its process until it said that it is ready.
        uds: Its Unix socket, if it has one.
    """

    pid: int
    port: int
    start_s: float
    uds: Path | None = None

    @property
    def tcp(self) -> Address:
        return ("127.0.0.1", self.port)

    def measure_resident_mb(self) -> float:
        """Return the resident memory of the process and its children, MB of 1e6 bytes."""
        process = psutil.Process(self.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 1e6


@contextmanager
def running_agent(version_dir: Path, directory: Path) -> Iterator[Server]:
    """Serve a version with `edge-agent serve`."""
    port, uds = find_free_port(), directory / "s"
    command = [sys.executable, "-m", "edge_agent", "serve", str(version_dir)]
    command += ["--http", f"127.0.0.1:{port}", "--uds", str(uds)]
    with running_server(command, port=port, directory=directory, uds=uds) as server:
        yield server


@contextmanager
def running_bare(version: BenchVersion, directory: Path) -> Iterator[Server]:
    """Serve a version with `bare.py`."""
    port, uds, graph = find_free_port(), directory / "s", version.directory / version.manifest.inference_name
    command = [sys.executable, "-m", "tests.bench.bare", str(graph), str(port), str(uds)]
    with running_server(command, port=port, directory=directory, uds=uds) as server:
        yield server


@contextmanager
def running_server(
    command: list[str],
    *,
    port: int,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    uds: Path | None = None,
    ready_path: str = "/v2/health/ready",
) -> Iterator[Server]:
    """Start `command` and wait until it answers 200 on `port`; its log is in `directory`."""
    log_path = directory / "server.log"
    with log_path.open("wb") as log:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
            stdout=log,
            stderr=log,
        )
    try:
        while not _is_ready(port, ready_path):
            assert process.poll() is None, log_path.read_text()
            assert time.perf_counter() < started_s + START_TIMEOUT_S, log_path.read_text()
            time.sleep(_POLL_S)
        yield Server(pid=process.pid, port=port, start_s=time.perf_counter() - started_s, uds=uds)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def build_json_request(version: BenchVersion) -> bytes:
    """Return a request of one row, in JSON."""
    row = version.x[:1]
    tensor = {**_describe(version, row), "data": row.ravel().tolist()}
    return build_post(_path(version), json.dumps({"inputs": [tensor]}).encode())


def build_binary_request(version: BenchVersion) -> bytes:
    """Return the same request with binary tensors, there and back."""
    row = version.x[:1]
    tensor = {**_describe(version, row), "parameters": {"binary_data_size": row.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    fields = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return build_post(_path(version), head + row.tobytes(), fields)


def check_answers(server: Server, version: BenchVersion, request: bytes, expected: npt.NDArray[np.float32]) -> None:
    """Fail unless the server answers `request` with `expected`."""
    with socket.create_connection(("127.0.0.1", server.port), START_TIMEOUT_S) as connection:
        connection.sendall(request)  # in one piece: the floor reads no further
        answer = HTTPResponse(connection, method="POST")
        answer.begin()
        data = answer.read()
    assert answer.status == 200, data
    length = answer.getheader("Inference-Header-Content-Length")
    if length is None:
        found = np.array(json.loads(data)["outputs"][0]["data"], np.float32)
    else:
        found = np.frombuffer(data, np.float32, offset=int(length))
    assert np.allclose(found, expected.ravel(), atol=1e-4), f"{found} is not {expected}"


def _is_ready(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _describe(version: BenchVersion, row: npt.NDArray[Any]) -> dict[str, Any]:
    return {"name": version.input_name, "shape": list(row.shape), "datatype": _DATATYPES[row.dtype.name]}


def _path(version: BenchVersion) -> str:
    return f"/v2/models/{version.manifest.model}/infer"
