"""Other ways to serve the same graph, each in a virtual environment of its own below `build/peers`.

MLServer as it comes (one worker process) and in process, and what one writes in ten lines of FastAPI. All run the
same onnxruntime session with one thread, and take the same request. The floor is what uvicorn can do at most.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.servers import Server, running_server
from tests.bench.versions import REPOSITORY, BenchVersion
from tests.simulators.agent import find_free_port

_HERE = Path(__file__).parent
_PINS_PATH = _HERE / "peers.txt"
_PROGRAMS_DIR = _HERE / "peer_programs"
_REQUIREMENTS = {
    "mlserver": ("mlserver==1.7.1", "uvloop<0.22", "onnxruntime"),  # it asks uvloop for what 0.22 took away
    "fastapi": ("fastapi", "uvicorn", "uvloop<0.22", "httptools", "onnxruntime"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to serve.

    Attributes:
        environment: Whose interpreter it runs with.
        program: What uvicorn serves there; "" if it is not uvicorn.
        workers: Processes that MLServer gives the model; 0 runs it in its own.
    """

    environment: str
    program: str = ""
    workers: int = 0


PEERS = {
    "mlserver_default": Peer(environment="mlserver", workers=1),
    "mlserver_in_process": Peer(environment="mlserver"),
    "fastapi": Peer(environment="fastapi", program="fastapi_program"),
}
UVICORN = {"uvicorn_floor": Peer(environment="fastapi", program="asgi_program")}  # binary tensors only


def prepare_peers(peers: Mapping[str, Peer] = PEERS) -> dict[str, Peer]:
    """Return those of `peers` that are here; installs them the first time, and says which cannot be."""
    missing = {name: reason for name in _REQUIREMENTS if (reason := _prepare(name)) is not None}
    for name, reason in missing.items():
        print(f"without {name}, which could not be installed: {reason}", file=sys.stderr)
    return {name: peer for name, peer in peers.items() if peer.environment not in missing}


@contextmanager
def running_peer(peer: Peer, version: BenchVersion, directory: Path) -> Iterator[Server]:
    """Serve `version` from files in the folder `directory`, which must exist."""
    port = find_free_port()
    path = str(version.directory / version.manifest.inference_name)
    if not peer.program:
        _write_settings(peer, version, directory, port)
        command = [str(_environment_dir("mlserver") / "bin" / "mlserver"), "start", str(directory)]
    else:
        command = [str(_find_python(peer.environment)), "-m", "uvicorn", f"{peer.program}:app", "--port", str(port)]
        command += ["--log-level", "warning", "--loop", "uvloop", "--http", "httptools", "--lifespan", "off"]
    environment = {"PYTHONPATH": str(_PROGRAMS_DIR), "GRAPH_PATH": path}
    with running_server(command, port=port, directory=directory, environment=environment) as server:
        yield server


def _write_settings(peer: Peer, version: BenchVersion, directory: Path, port: int) -> None:
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": find_free_port(),
        "metrics_port": find_free_port(),
        "parallel_workers": peer.workers,
        "debug": False,  # its default logs every request
    }
    model = {
        "name": version.manifest.model,
        "implementation": "mlserver_program.OnnxModel",
        "parameters": {"uri": str(version.directory / version.manifest.inference_name)},
    }
    (directory / "settings.json").write_text(json.dumps(settings))
    (directory / "model-settings.json").write_text(json.dumps(model))


def _prepare(name: str) -> str | None:
    """Install what is not there; return why that failed."""
    directory = _environment_dir(name)
    mark = directory / "ready"
    if mark.exists():
        return None
    print(f"installing {name} below {directory.parent}, once", file=sys.stderr)
    install = [str(_find_python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(directory)],
        [*install, "--constraint", str(_PINS_PATH), *_REQUIREMENTS[name]],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"])[-1]
    mark.touch()
    return None


def _environment_dir(name: str) -> Path:
    state = hashlib.sha256(_PINS_PATH.read_bytes() + repr(_REQUIREMENTS[name]).encode()).hexdigest()[:12]
    return REPOSITORY / "build" / "peers" / f"{name}-{state}"


def _find_python(name: str) -> Path:
    return _environment_dir(name) / "bin" / "python"
