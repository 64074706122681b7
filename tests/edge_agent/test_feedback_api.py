"""The truth about an earlier answer becomes a sample, over the agent's own Unix socket."""

from pathlib import Path

import httpx

from tests.simulators.agent import MODEL, AgentProcess, install_version

INFER = f"/v2/models/{MODEL}/infer"
GOOD = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def test_answered_request_and_its_truth_become_a_sample_with_consent(tmp_path: Path) -> None:
    device = AgentProcess(tmp_path, extra="[samples]\nconsent = true\n")
    device.state_dir.mkdir()
    install_version(device.state_dir, trainable=True)
    with device:
        answer = httpx.post(device.url + INFER, json=GOOD | {"id": "mine"}).json()
        assert answer["id"] == "mine"
        ours = answer["parameters"]["feedback_id"]
        kept = device.ask("POST", "/v1/feedback", json={"id": ours, "target": 2})
        assert kept.is_success, kept.text
        assert device.status()["samples"] == 1
        assert device.ask("POST", "/v1/feedback", json={"id": ours, "target": 2}).status_code in (404, 410)
        assert device.ask("POST", "/v1/feedback", json={"target": 2}).status_code == 400
        assert httpx.post(f"{device.url}/v1/feedback", json={"id": ours, "target": 2}).status_code == 401


def test_without_consent_nothing_is_remembered_and_the_key_is_named(tmp_path: Path) -> None:
    device = AgentProcess(tmp_path)
    device.state_dir.mkdir()
    install_version(device.state_dir)
    with device:
        answer = httpx.post(device.url + INFER, json=GOOD).json()
        assert "id" not in answer
        refused = device.ask("POST", "/v1/feedback", json={"id": "x", "target": 2})
        assert refused.status_code == 403
        assert "consent" in refused.json()["error"]
