"""NVIDIA's tritonclient, unchanged, against a real `edge-agent serve`, through both doors."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_agent.rpc.messages import load_messages
from models.tensors.spec import DTYPES
from tests.simulators.agent import find_free_port
from tests.simulators.echo_model import save_echo_version
from tests.simulators.environments import prepare_python
from tests.simulators.serve import serving_version

STATUS_OF = {
    "StatusCode.INVALID_ARGUMENT": "400",
    "StatusCode.NOT_FOUND": "404",
    "StatusCode.PERMISSION_DENIED": "403",
}
TRITON_DIR = Path(__file__).parents[2] / "simulators" / "triton"


@pytest.fixture(scope="module", params=["http", "grpc"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kind, port = request.param, find_free_port()
    directory = tmp_path_factory.mktemp("triton")
    save_echo_version(directory / "echo")
    python = prepare_python("tritonclient", TRITON_DIR / "pins.txt")
    with serving_version(directory / "echo", directory / "log", "--grpc", f"127.0.0.1:{port}") as (address, _):
        asked = subprocess.run(
            [python, TRITON_DIR / "program.py", kind, address if kind == "http" else f"127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert asked.returncode == 0, asked.stderr
    document: dict[str, Any] = json.loads(asked.stdout)
    return document if kind == "http" else {**document, **_read_as_over_http(document)}


def _read_as_over_http(document: dict[str, Any]) -> dict[str, Any]:
    """Return what protobuf's JSON says in other words: 64-bit numbers are texts, messages have names, zeros are left out."""
    config = document["config"]["config"]
    inputs = [{**tensor, "dims": [int(length) for length in tensor["dims"]]} for tensor in config["input"]]
    return {
        "config": {**config, "input": inputs},
        "index": [{"reason": "", **line} for line in document["index"]["models"]],
        "refused": [[STATUS_OF[code], text] for code, text in document["refused"]],
        **{each: _read_statistics(document[each]) for each in ("statistics", "all_statistics")},
    }


def _read_statistics(statistics: dict[str, Any]) -> dict[str, Any]:
    def read(message: dict[str, Any]) -> dict[str, Any]:
        return {
            key: int(value) if key != "version" and isinstance(value, str) and value.isdecimal() else value
            for key, value in message.items()
        }

    document: dict[str, Any] = json.loads(json.dumps(statistics), object_hook=read)
    return document


def test_health_and_metadata(found: dict[str, Any]) -> None:
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, [True, True, False])
    assert found["server"]["name"] == "edge-agent"
    assert "binary_tensor_data" in found["server"]["extensions"]
    metadata = found["metadata"]
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("echo", ["1"], "onnxruntime_onnx")
    assert [tensor["name"] for tensor in metadata["inputs"]] == [f"{dtype}_in" for dtype in DTYPES]
    assert {tensor["datatype"] for tensor in metadata["outputs"]} >= {"FP16", "BYTES", "UINT64", "BOOL"}
    assert found["config"]["max_batch_size"] > 0
    assert found["config"]["input"][0] == {"name": "float32_in", "data_type": "TYPE_FP32", "dims": [2]}


@pytest.mark.parametrize("way", ["binary", "json", "mixed", "all"])
def test_every_dtype_comes_back_as_it_went(found: dict[str, Any], way: str) -> None:
    assert found[way] == {"wrong": [], "id": "7" if way == "binary" else "", "version": "1"}


def test_refusals_say_what_was_expected(found: dict[str, Any]) -> None:
    wrong_inputs, unknown, load, unload = found["refused"]
    assert wrong_inputs[0] == "400"
    assert "expected inputs 'bool_in'" in wrong_inputs[1]
    assert "'other' is not served here" in unknown[1]
    assert [load[0], unload[0]] == ["403", "403"]


def test_statistics_and_repository_index(found: dict[str, Any]) -> None:
    for each in ("statistics", "all_statistics"):
        (model,) = found[each]["model_stats"]
        assert (model["name"], model["version"], model["inference_count"]) == ("echo", "1", 12)
        stats = model["inference_stats"]
        assert (stats["success"]["count"], stats["fail"]["count"]) == (4, 1)
        assert stats["success"]["ns"] > stats["compute_infer"]["ns"] > 0
        assert model["last_inference"] > 1_600_000_000_000
    assert found["index"] == [{"name": "echo", "version": "1", "state": "READY", "reason": ""}]


def test_protocol_has_the_numbers_and_types_of_the_clients(found: dict[str, Any]) -> None:
    theirs = found.get("fields")
    if theirs is None:  # over HTTP
        return
    waiting = [message.DESCRIPTOR for message in load_messages().values()]
    while waiting:
        message = waiting.pop()
        waiting += message.nested_types
        ours = {field.name: [field.number, field.type, field.is_repeated] for field in message.fields}
        assert ours.items() <= theirs[message.full_name].items(), message.full_name
