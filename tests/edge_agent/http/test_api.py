"""The local API over real sockets: an agent process on TCP and a Unix socket."""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from edge_agent.http.guard import TOKEN_NAME
from edge_agent.http.listener import Limits
from edge_agent.http.oip import ROWS_MAX
from tests.simulators.agent import MODEL, AgentProcess, install_version
from tests.simulators.tiny_models import FEATURES

INFER = f"/v2/models/{MODEL}/infer"
GOOD = {"inputs": [{"name": "features", "shape": [1, FEATURES], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    device = AgentProcess(tmp_path_factory.mktemp("a"))
    device.state_dir.mkdir()
    install_version(device.state_dir, 2)
    with device:
        yield device


def assert_refused(answer: httpx.Response, status: int, said: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]
    assert len(answer.json()["error"]) > 15


def test_inference_on_both_sockets(agent: AgentProcess) -> None:
    for answer in (httpx.post(agent.url + INFER, json=GOOD), agent.ask("POST", INFER, json=GOOD)):
        assert answer.json() == {
            "model_name": MODEL,
            "model_version": "2",
            "outputs": [{"name": "logits", "shape": [1, 3], "datatype": "FP32", "data": [20, 20, 20]}],
        }
    versioned = httpx.post(f"{agent.url}/v2/models/{MODEL}/versions/2/infer", json={**GOOD, "id": "mine"})
    assert versioned.json()["id"] == "mine"


def test_metadata_and_health(agent: AgentProcess) -> None:
    get = httpx.Client(base_url=agent.url).get
    assert get("/v2").json()["name"] == "edge-agent"
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    for path in (f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/2"):
        assert get(path).json() == {
            "name": MODEL,
            "versions": ["2"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, FEATURES]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
            "parameters": {"labels": ["low", "middle", "high"]},
        }
        assert get(path + "/ready").json() == {"name": MODEL, "ready": True}
    metrics = get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert f'edge_agent_active_version{{model="{MODEL}"}} 2' in metrics.text


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/", 404, "nothing at"),
        ("GET", "/v2/", 404, "nothing at"),
        ("GET", "/v3", 404, "nothing at"),
        ("GET", "/v2/models/other", 404, "'other' is not served here, 'tiny' is"),
        ("GET", f"/v2/models/{MODEL}/versions/9", 404, "version '9' of 'tiny' is not loaded, 2 is"),
        ("POST", "/v2/models/%ff%00/infer", 404, "is not served here"),
        ("GET", INFER, 405, "expected POST, got GET"),
        ("PUT", INFER, 405, "expected POST, got PUT"),
        ("POST", "/v2", 405, "expected GET, got POST"),
        ("POST", "/v1/samples", 401, "Unix socket"),
        ("GET", "/v1/privacy", 401, "Unix socket"),
        ("GET", "/v1/status", 401, "Unix socket"),
        ("GET", "/v1/anything", 401, "Unix socket"),
    ],
)
def test_wrong_addresses_are_answered_in_a_sentence(
    agent: AgentProcess, method: str, path: str, status: int, said: str
) -> None:
    answer = httpx.request(method, agent.url + path)
    assert_refused(answer, status, said)
    if status == 405:
        assert answer.headers["allow"] == said.split()[1].rstrip(",")


def tensor(**changes: object) -> dict:
    return {"inputs": [{**GOOD["inputs"][0], **changes}]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b'"' + b"\xc3\x28" + b'"', "JSON"),
        (b"[" * 1_000_000, "JSON"),
        (b"{}", "missing required field `inputs`"),
        ({"inputs": []}, "expected inputs 'features', got none"),
        (tensor(name="x"), "expected inputs 'features', got 'x'"),
        (tensor(datatype="FP64"), "expected float32, got float64"),
        (tensor(datatype="BYTES"), "must be a list of strings"),
        (tensor(shape=[4]), "expected shape (rows, 4)"),
        (tensor(shape=[1, 2, 2]), "expected shape (rows, 4)"),
        (tensor(shape=[2, 2]), "expected shape (rows, 4)"),
        (tensor(shape=[2, 4]), "has 8 values, data has 4"),
        (tensor(data=[1, 2, 3, None]), "got `null`"),
        (b'{"inputs":[{"name":"features","shape":[1,4],"datatype":"FP32","data":[1,2,3,NaN]}]}', "JSON"),
        ({**GOOD, "outputs": [{"name": "x"}]}, "expected one of 'logits'"),
        ({**GOOD, "id": 7}, "Expected `str`, got `int`"),
    ],
)
def test_bad_inputs_are_400_with_a_sentence_on_both_sockets(agent: AgentProcess, body: object, said: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert_refused(httpx.post(agent.url + INFER, content=content), 400, said)
    assert_refused(agent.ask("POST", INFER, content=content), 400, said)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_web_pages_are_refused(agent: AgentProcess, origin: str) -> None:
    answer = httpx.post(agent.url + INFER, json=GOOD, headers={"Origin": origin})
    assert_refused(answer, 403, "Origin")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@evil"])
def test_foreign_host_as_after_dns_rebinding_is_refused(agent: AgentProcess, host: str) -> None:
    assert_refused(httpx.post(agent.url + INFER, json=GOOD, headers={"Host": host}), 403, "Host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:80", "[::1]"])
def test_own_names_are_welcome(agent: AgentProcess, host: str) -> None:
    assert httpx.post(agent.url + INFER, json=GOOD, headers={"Host": host}).is_success


def test_configuration_statistics_and_index_are_as_tritons(agent: AgentProcess) -> None:
    config = httpx.get(f"{agent.url}/v2/models/{MODEL}/config").json()
    assert config["input"] == [{"name": "features", "data_type": "TYPE_FP32", "dims": [FEATURES]}]
    assert config["max_batch_size"] == ROWS_MAX
    (before,) = httpx.get(f"{agent.url}/v2/models/stats").json()["model_stats"]
    assert httpx.post(agent.url + INFER, json=GOOD).is_success
    assert not httpx.post(agent.url + INFER, json={}).is_success
    for path in ("", "/versions/2"):
        (after,) = httpx.get(f"{agent.url}/v2/models/{MODEL}{path}/stats").json()["model_stats"]
        assert (after["name"], after["version"]) == (MODEL, "2")
        for outcome in ("success", "fail"):
            counts = [document["inference_stats"][outcome]["count"] for document in (before, after)]
            assert counts[1] == counts[0] + 1
    index = httpx.post(f"{agent.url}/v2/repository/index").json()
    assert index == [{"name": MODEL, "version": "2", "state": "READY", "reason": ""}]
    assert "binary_tensor_data" in httpx.get(f"{agent.url}/v2").json()["extensions"]


def test_loading_is_off_unless_configured(agent: AgentProcess) -> None:
    for change in ("load", "unload"):
        assert_refused(agent.ask("POST", f"/v2/repository/models/{MODEL}/{change}"), 403, "repository = true")


def test_unloading_and_loading_a_model_where_the_owner_allows_it(tmp_path: Path) -> None:
    device = AgentProcess(tmp_path, extra="[serving]\nrepository = true\n")
    device.state_dir.mkdir()
    install_version(device.state_dir, 2)
    with device:
        assert device.ask("POST", f"/v2/repository/models/{MODEL}/unload").is_success
        assert httpx.get(device.url + "/v2/health/ready").status_code == 503
        assert httpx.post(f"{device.url}/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"
        assert_refused(httpx.post(device.url + INFER, json=GOOD), 503)
        assert device.ask("POST", f"/v2/repository/models/{MODEL}/load").is_success
        assert httpx.post(device.url + INFER, json=GOOD).is_success


def test_binary_tensors_beside_json(agent: AgentProcess) -> None:
    values = np.arange(2 * FEATURES, dtype="<f4").reshape(2, FEATURES)
    asked = {
        "id": "b1",
        "inputs": [{"name": "features", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(asked).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = httpx.post(agent.url + INFER, content=text + values.tobytes(), headers=headers)
    json_bytes = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.content[:json_bytes])["outputs"]
    assert output == {
        "name": "logits",
        "shape": [2, 3],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 24},
    }
    logits = np.frombuffer(answer.content[json_bytes:], "<f4").reshape(2, 3)
    np.testing.assert_array_equal(logits, np.repeat(2 * values.sum(1, keepdims=True), 3, 1))
    assert_refused(httpx.post(agent.url + INFER, content=text, headers=headers), 400, "0 bytes left")


def test_feedback_joins_the_request_that_the_server_named(tmp_path: Path) -> None:
    device = AgentProcess(tmp_path, extra="[samples]\nconsent = true\n")
    device.state_dir.mkdir()
    install_version(device.state_dir, 2, trainable=True)
    with device:
        named = httpx.post(device.url + INFER, json=GOOD).json()["id"]
        own = httpx.post(device.url + INFER, json={**GOOD, "id": "mine"}).json()
        assert own["id"] == "mine"
        for request_id in (named, own["parameters"]["feedback_id"]):
            told = device.ask("POST", "/v1/feedback", json={"id": request_id, "target": 1})
            assert len(told.json()["ids"]) == 1
        assert_refused(device.ask("POST", "/v1/feedback", json={"id": "mine", "target": 1}), 404)
        assert_refused(device.ask("POST", "/v1/feedback", json={"id": 1}), 400, "expected {")


def test_samples_go_in_over_the_unix_socket_and_are_counted(agent: AgentProcess) -> None:
    before = agent.status()["samples"]
    samples = [{"x": [1, 2, 3, 4], "y": 1}, {"x": [0.5, 0, 0, 0], "y": 2}]
    ids = agent.ask("POST", "/v1/samples", json={"samples": samples}).json()["ids"]
    assert len(ids) == len(set(ids)) == 2
    assert_refused(agent.ask("POST", "/v1/samples", json={"samples": [*samples, {"x": ["a"], "y": 1}]}), 400)
    assert_refused(httpx.post(agent.url + "/v1/samples", json={"samples": samples}), 401)
    assert agent.status()["samples"] == before + 2


def test_bearer_of_the_token_may_write_over_tcp_and_a_web_page_that_knows_it_may_not(agent: AgentProcess) -> None:
    token = (agent.state_dir / TOKEN_NAME).read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    samples = {"samples": [{"x": [1, 2, 3, 4], "y": 1}]}
    assert httpx.post(agent.url + "/v1/samples", json=samples, headers=headers).is_success
    assert httpx.get(agent.url + "/v1/status", headers=headers).json()["device_id"]
    assert_refused(httpx.post(agent.url + "/v1/samples", json=samples, headers={"Authorization": "Bearer x"}), 401)
    for foreign in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert_refused(httpx.post(agent.url + "/v1/samples", json=samples, headers=headers | foreign), 403)


def test_privacy_of_a_device_that_never_trained(agent: AgentProcess) -> None:
    report = agent.ask("GET", "/v1/privacy").json()
    assert report == {
        "epsilon_limit": "8",
        "noise_multiplier_limit": "0",
        "delta": "0.001",
        "spent": [],
        "last": [],
        "total_epsilon": "0",
        "total_epsilon_limit": "8",
        "total_left": "8",
        "trusts_coordinator": False,
    }


def test_unix_socket_is_for_user_and_group_only(agent: AgentProcess) -> None:
    assert agent.uds_path.stat().st_mode & 0o777 == 0o660


def test_body_that_says_it_is_too_long_is_refused_unread(agent: AgentProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(1 << 30))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert str(Limits().body_bytes) in json.loads(answer.read())["error"]


def test_endless_body_is_refused_on_the_way_and_memory_stays_flat(agent: AgentProcess) -> None:
    before_mb = agent.status()["rss_mb"]
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as sending:
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        sending.sendall(head.encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(Limits().body_bytes // 0x10000 + 400):
            sending.sendall(chunk)
        assert sending.recv(1000).startswith(b"HTTP/1.1 413")
    assert agent.status()["rss_mb"] < before_mb + 20


def test_gigabyte_of_body_costs_no_memory_and_nobody_else_waits(agent: AgentProcess) -> None:
    before_mb = agent.status()["rss_mb"]
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as sending:
        head = (
            f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 30}\r\nContent-Encoding: gzip\r\n\r\n"
        )
        sending.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(1 << 14):
                sending.sendall(b" " * 0x10000)
        assert httpx.post(agent.url + INFER, json=GOOD, timeout=5).is_success
    assert agent.status()["rss_mb"] < before_mb + 10


def test_compressed_body_is_refused_without_unpacking_it(agent: AgentProcess) -> None:
    answer = httpx.post(agent.url + INFER, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert_refused(answer, 415, "content-encoding")


def test_two_hundred_half_open_connections_do_not_keep_others_waiting(agent: AgentProcess) -> None:
    before_mb = agent.status()["rss_mb"]
    half_open = []
    for _ in range(200):
        opened = socket.create_connection(("127.0.0.1", agent.port), timeout=20)
        opened.sendall(b"POST /v2 HTTP/1.1\r\nHost: localhost\r\n")
        half_open.append(opened)
    assert httpx.post(agent.url + INFER, json=GOOD, timeout=5).is_success
    assert agent.status()["rss_mb"] < before_mb + 20
    for opened in half_open:
        opened.close()


def test_body_that_never_ends_is_408(agent: AgentProcess) -> None:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as waiting:
        waiting.sendall(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{{".encode())
        assert waiting.recv(1000).startswith(b"HTTP/1.1 408")


def test_no_request_of_this_module_was_an_error_of_the_agent(agent: AgentProcess) -> None:
    assert httpx.post(agent.url + INFER, json=GOOD).is_success
    assert "ERROR" not in agent.log_path.read_text()


def test_device_without_a_model_is_live_and_says_that_it_is_not_ready(tmp_path: Path) -> None:
    with AgentProcess(tmp_path) as bare:
        answer = httpx.get(bare.url + "/v2/health/ready")
        assert (answer.status_code, answer.json()) == (503, {"ready": False})
        assert_refused(httpx.post(bare.url + INFER, json=GOOD), 503, "waits for its first release")
        assert bare.ask("POST", "/v1/samples", json={"samples": [{"x": [1], "y": 0}]}).is_success
        assert bare.status()["ready"] is False
