"""The gRPC door of a real agent: who may what, and what nobody may."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_agent.rpc.messages import load_messages
from edge_agent.rpc.service import SERVICE
from tests.simulators.agent import AgentProcess, find_free_port, install_version

MESSAGES = load_messages()
GOOD = {"name": "features", "datatype": "FP32", "shape": [1, 4], "contents": {"fp32_contents": [1, 2, 3, 4]}}
RAW = {"name": "features", "datatype": "FP32", "shape": [1, 4]}


class Client:
    """Any method with any bytes."""

    def __init__(self, port: int, **options: Any) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", **options)

    def send(self, method: str, data: bytes = b"", metadata: tuple[tuple[str, str], ...] = (), **options: Any) -> Any:
        call = self.channel.unary_unary(f"/{SERVICE}/{method}")
        return MESSAGES[f"{method}Response"].FromString(call(data, metadata=metadata, timeout=20, **options))

    def ask(self, method: str, metadata: tuple[tuple[str, str], ...] = (), **fields: Any) -> Any:
        return self.send(method, MESSAGES[f"{method}Request"](**fields).SerializeToString(), metadata)

    def infer(self, **fields: Any) -> Any:
        return self.ask("ModelInfer", **{"model_name": "tiny", "inputs": [GOOD], **fields})


@pytest.fixture(scope="module")
def agent() -> Iterator[tuple[AgentProcess, Client]]:
    port = find_free_port()
    with tempfile.TemporaryDirectory(prefix="edge-") as folder:  # a socket's path is limited
        device = AgentProcess(Path(folder), extra=f"[grpc]\nport = {port}\n[serving]\nrepository = true\n")
        device.state_dir.mkdir()
        install_version(device.state_dir)
        with device:
            client = Client(port)
            yield device, client
            client.channel.close()


def refuse(call: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call(*arguments, **options)
    return refused.value.code().name, refused.value.details()


def test_both_doors_lead_to_the_same_model_and_counts(agent: tuple[AgentProcess, Client]) -> None:
    device, client = agent
    answer = client.infer(id="7", outputs=[{"name": "logits"}])
    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "1", "7")
    assert list(answer.outputs[0].contents.fp32_contents) == [10.0, 10.0, 10.0]
    device.ask("POST", "/v2/models/tiny/infer", json={"inputs": [{**RAW, "data": [1, 2, 3, 4]}]})
    counts = device.ask("GET", "/v2/models/tiny/stats").json()["model_stats"][0]["inference_stats"]
    (found,) = client.ask("ModelStatistics").model_stats
    assert found.inference_stats.success.count == counts["success"]["count"] >= 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_name": "other"}, ("NOT_FOUND", "'other' is not served here")),
        ({"model_version": "9"}, ("NOT_FOUND", "version '9'")),
        ({"inputs": []}, ("INVALID_ARGUMENT", "expected inputs 'features', got none")),
        ({"inputs": [GOOD, GOOD]}, ("INVALID_ARGUMENT", "each input once")),
        ({"inputs": [{**GOOD, "name": "x" * 5000}]}, ("INVALID_ARGUMENT", "expected inputs 'features'")),
        ({"inputs": [{**GOOD, "datatype": "FP128"}]}, ("INVALID_ARGUMENT", "expected a datatype of")),
        ({"inputs": [{**GOOD, "shape": []}]}, ("INVALID_ARGUMENT", "expected a shape of")),
        ({"inputs": [{**GOOD, "shape": [-1, 4]}]}, ("INVALID_ARGUMENT", "expected a shape of")),
        ({"inputs": [{**GOOD, "shape": [1, 2**62, 2**62]}]}, ("INVALID_ARGUMENT", "data has 4")),
        ({"inputs": [{**GOOD, "shape": [2**40, 4]}]}, ("RESOURCE_EXHAUSTED", "at most 16384 rows")),
        ({"inputs": [{**GOOD, "contents": {"int_contents": [1]}}]}, ("INVALID_ARGUMENT", "in fp32_contents, got int_")),
        ({"inputs": [{**GOOD, "datatype": "FP16"}]}, ("INVALID_ARGUMENT", "FP16 in raw_input_contents")),
        (
            {"inputs": [{**GOOD, "datatype": "INT8", "contents": {"int_contents": [1, 2, 3, 128]}}]},
            ("INVALID_ARGUMENT", "beyond INT8"),
        ),
        (
            {"inputs": [{**RAW, "datatype": "BYTES", "contents": {"bytes_contents": [b"\xff"] * 4}}]},
            ("INVALID_ARGUMENT", "not UTF-8"),
        ),
        (
            {"inputs": [{**RAW, "datatype": "BYTES", "contents": {"bytes_contents": [b""] * 70_000}}]},
            ("RESOURCE_EXHAUSTED", "at most 65536 strings"),
        ),
        ({"raw_input_contents": [bytes(16)]}, ("INVALID_ARGUMENT", "got both")),
        ({"inputs": [RAW], "raw_input_contents": [bytes(16)] * 2}, ("INVALID_ARGUMENT", "each of 1 inputs, got 2")),
        ({"inputs": [RAW], "raw_input_contents": [bytes(15)]}, ("INVALID_ARGUMENT", "has 16 bytes, got 15")),
        ({"inputs": [RAW] * 65}, ("INVALID_ARGUMENT", "at most 64 inputs")),
        ({"id": "x" * 2000}, ("INVALID_ARGUMENT", "at most 1024 characters")),
        ({"outputs": [{"name": "no"}]}, ("INVALID_ARGUMENT", "'no': expected one of 'logits'")),
        ({"inputs": [RAW], "raw_input_contents": [bytes(5 * 1024 * 1024)]}, ("RESOURCE_EXHAUSTED", "")),
    ],
)
def test_wrong_request_is_refused_in_a_sentence(
    agent: tuple[AgentProcess, Client], fields: dict[str, Any], expected: tuple[str, str]
) -> None:
    _, client = agent
    code, details = refuse(client.infer, **fields)
    assert (code, expected[1] in details) == (expected[0], True), details
    assert client.infer().outputs


def test_what_is_no_message_or_no_method_or_packed_is_refused(agent: tuple[AgentProcess, Client]) -> None:
    _, client = agent
    code, details = refuse(client.send, "ModelInfer", b"\xff\xff")
    assert (code, "inference.ModelInferRequest" in details) == ("INVALID_ARGUMENT", True)
    assert refuse(client.channel.unary_unary(f"/{SERVICE}/ModelStreamInfer"), b"")[0] == "UNIMPLEMENTED"
    stream = client.channel.stream_unary(f"/{SERVICE}/ServerLive")
    assert refuse(stream, iter(())) == ("INVALID_ARGUMENT", "expected one message, got none")
    data = MESSAGES["ModelInferRequest"](model_name="tiny", id="x" * 1000, inputs=[GOOD]).SerializeToString()
    code, _ = refuse(client.send, "ModelInfer", data, compression=grpc.Compression.Gzip)
    assert code == "UNIMPLEMENTED"
    assert client.ask("ServerLive").live


def test_only_the_owner_loads_and_unloads_and_no_web_page_asks_at_all(agent: tuple[AgentProcess, Client]) -> None:
    device, client = agent
    token = (device.state_dir / "api.token").read_text().strip()
    owner = (("authorization", f"Bearer {token}"),)
    for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        for metadata in ((), (("authorization", "Bearer no"),)):
            assert refuse(client.ask, method, metadata, model_name="tiny")[0] == "UNAUTHENTICATED"
        assert refuse(client.ask, method, owner, model_name="other")[0] == "NOT_FOUND"
    assert refuse(client.ask, "ServerLive", (("origin", "http://evil.example"),))[0] == "PERMISSION_DENIED"
    client.ask("RepositoryModelUnload", owner, model_name="tiny")
    assert not client.ask("ModelReady", name="tiny").ready
    assert refuse(client.infer)[0] == "UNAVAILABLE"
    assert client.ask("RepositoryIndex").models[0].state == "UNAVAILABLE"
    assert not client.ask("RepositoryIndex", ready=True).models
    client.ask("RepositoryModelLoad", owner, model_name="tiny")
    assert client.ask("ModelReady", name="tiny", version="1").ready
    assert client.infer().outputs
