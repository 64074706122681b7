"""The local API over real sockets: an agent process on TCP and a Unix socket."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_agent.http.app import BODY_MAX_BYTES
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
        ("GET", f"/v2/models/{MODEL}/stats", 404, "nothing at"),
        ("GET", "/v2/models/other", 404, "'other' is not served here, 'tiny' is"),
        ("GET", f"/v2/models/{MODEL}/versions/9", 404, "'9' of 'tiny' is not loaded, 2 is"),
        ("POST", "/v2/models/%ff%00/infer", 404, "is not served here"),
        ("GET", INFER, 405, "expected POST, got GET"),
        ("PUT", INFER, 405, "expected POST, got PUT"),
        ("POST", "/v2", 405, "expected GET, got POST"),
        ("POST", "/v1/samples", 403, "Unix socket only"),
        ("GET", "/v1/privacy", 403, "Unix socket only"),
        ("GET", "/v1/status", 403, "Unix socket only"),
        ("GET", "/v1/anything", 403, "Unix socket only"),
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
        (tensor(datatype="BYTES"), "expected a datatype of"),
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


def test_samples_go_in_over_the_unix_socket_and_are_counted(agent: AgentProcess) -> None:
    before = agent.status()["samples"]
    samples = [{"x": [1, 2, 3, 4], "y": 1}, {"x": [0.5, 0, 0, 0], "y": 2}]
    ids = agent.ask("POST", "/v1/samples", json={"samples": samples}).json()["ids"]
    assert len(ids) == len(set(ids)) == 2
    assert_refused(agent.ask("POST", "/v1/samples", json={"samples": [*samples, {"x": ["a"], "y": 1}]}), 400)
    assert_refused(httpx.post(agent.url + "/v1/samples", json={"samples": samples}), 403)
    assert agent.status()["samples"] == before + 2


def test_privacy_of_a_device_that_never_trained(agent: AgentProcess) -> None:
    report = agent.ask("GET", "/v1/privacy").json()
    assert report == {"epsilon_limit": "8", "noise_multiplier_limit": "0", "delta": "0.001", "spent": []}


def test_unix_socket_is_for_user_and_group_only(agent: AgentProcess) -> None:
    assert agent.uds_path.stat().st_mode & 0o777 == 0o660


def test_body_that_says_it_is_too_long_is_refused_unread(agent: AgentProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(1 << 30))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert str(BODY_MAX_BYTES) in json.loads(answer.read())["error"]


def test_endless_body_is_refused_on_the_way_and_memory_stays_flat(agent: AgentProcess) -> None:
    before_mb = agent.status()["rss_mb"]
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as sending:
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        sending.sendall(head.encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(BODY_MAX_BYTES // 0x10000 + 400):
            sending.sendall(chunk)
        assert sending.recv(1000).startswith(b"HTTP/1.1 413")
    assert agent.status()["rss_mb"] < before_mb + 20


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
