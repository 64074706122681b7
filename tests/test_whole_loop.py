"""The whole loop as users run it: broker, coordinator, SuperLink and agents as real processes, and kills."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.client import AgentClient
from edge_agent.training.ledger import parse_ledger
from fl_server.demo.federation import LocalDevice, LocalFederation
from fl_server.demo.load import Client, LoadGenerator
from models.definitions import digits
from tests.simulators.waiting import wait_until

DEVICES, ROUNDS = 3, 2
DEFINITION = "models.definitions.digits:definition"
SPLITS = digits.load_splits(DEVICES, 0)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFederation]:
    """Three devices with samples of their own, all on version 1, whose owners allow more than one run."""
    monkeypatch.setenv("EDGE_AGENT_PRIVACY__EPSILON_LIMIT", "20")
    monkeypatch.setenv("FL_SERVER_BROKER__REVOCATION_INTERVAL_S", "0.5")
    with LocalFederation(
        tmp_path / "federation", definition=DEFINITION, model="digits", validation=validation()
    ) as federation:
        federation.start_broker()
        federation.enroll(DEVICES)
        federation.start_coordinator()
        federation.start_devices()
        for device, samples in zip(federation.devices, SPLITS.devices, strict=True):
            federation.wait_until(device.socket_path.exists, f"the socket of {device.device_id}")
            device.ingest(samples.x[:60], samples.y[:60])
        package(federation, tmp_path / "v1")
        federation.fl_server("release", str(tmp_path / "v1"))
        federation.wait_until(lambda: federation.all_serve(1), "all devices to serve version 1")
        yield federation


def test_devices_learn_and_serve_what_was_learnt_through_kills_of_everything(federation: LocalFederation) -> None:
    clients = [Client(device.port, "digits", "image") for device in federation.devices]
    load = LoadGenerator(clients, SPLITS.test.x, requests_per_s=50)
    with training(federation, "--rounds", str(ROUNDS)) as command:
        wait_for_an_update(federation, round_number=1)
        kill_coordinator_and_restart(federation)
        wait_for_an_update(federation, round_number=2)
        assert federation.broker is not None
        federation.broker.kill()
        federation.start_broker()
        result = finish(command)
    champion = max(outcome["version"] for outcome in result["rounds"] if outcome["promoted"])
    federation.wait_until(lambda: federation.all_serve(champion), f"all devices to serve version {champion}")
    load.close()

    assert champion >= 2
    assert [answer for answer in load.answers if answer.version is None] == []
    assert [outcome["round"] for outcome in result["rounds"]] == [1, 2]
    for device in federation.devices:
        entries = parse_ledger((device.config_path.parent / "state/training/ledger.jsonl").read_bytes())[0]
        rounds = [entry.round for entry in entries]
        assert rounds == sorted(set(rounds)), "a round was paid for twice"
        assert "round 1 of run" in device.log_path.read_text()
        with AgentClient(device.socket_path) as agent:
            (spent,) = agent.get("/v1/privacy")["spent"]
        assert spent["rounds"] == ROUNDS
        assert 0 < float(spent["epsilon"]) <= float(result["epsilon"]) <= 8
    reinstall_and_train_again(federation, federation.devices[0], champion)
    revoke(federation, federation.devices[0])


def reinstall_and_train_again(federation: LocalFederation, device: LocalDevice, version: int) -> None:
    """Kill a device's agent and wipe its ledger: it goes on with what the coordinator remembers."""
    assert device.agent is not None
    device.agent.kill()
    ledger_path = device.config_path.parent / "state/training/ledger.jsonl"
    before = parse_ledger(ledger_path.read_bytes())[0]
    shutil.rmtree(ledger_path.parent)
    device.start()
    federation.wait_until(lambda: device.get_version("digits") == version, "the killed agent to serve again")
    with training(federation, "--rounds", "1", "--epsilon", "2") as command:
        finish(command)
    restored, spend = parse_ledger(ledger_path.read_bytes())[0]
    assert restored.restored_from is not None
    assert spend.epsilon_before == restored.epsilon_after == before[-1].epsilon_after
    with AgentClient(device.socket_path) as agent:
        (spent,) = agent.get("/v1/privacy")["spent"]
    assert float(spent["epsilon"]) == float(spend.epsilon_after) > float(before[-1].epsilon_after)


def revoke(federation: LocalFederation, device: LocalDevice) -> None:
    """Exclude a device that is connected: it serves on, alone, and the others stay where they are."""
    federation.fl_server("revoke", device.device_id)
    federation.wait_until(lambda: not is_connected(device), "the revoked device to be shut out")
    federation.wait_until(
        lambda: "device.pem expired, revoked" in device.log_path.read_text(),
        "the broker to refuse the revoked device",
    )
    assert [is_connected(other) for other in federation.devices] == [
        other is not device for other in federation.devices
    ]
    assert device.get_version("digits") is not None


def is_connected(device: LocalDevice) -> bool:
    with AgentClient(device.socket_path) as agent:
        return bool(agent.get("/v1/status")["connected"])


@contextmanager
def training(federation: LocalFederation, *options: str) -> Iterator[subprocess.Popen[str]]:
    command, environment = federation.fl_server_command(
        "train", "digits", "--json", "--steps", "3", "--learning-rate", "0.5", *options
    )
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(command: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = command.communicate(timeout=120)
    assert command.returncode == 0
    document: dict[str, Any] = json.loads(output)
    return document


def wait_for_an_update(federation: LocalFederation, *, round_number: int) -> None:
    """Return within a round that has an update; a round so quick that it was missed has left its checkpoint."""
    rounds = federation.server_dir.glob
    round_dir = f"runs/*/rounds/{round_number:04}"
    wait_until(
        lambda: any(rounds(f"{round_dir}/updates/*")) or any(rounds(f"{round_dir}/checkpoint.json")),
        f"an update of round {round_number}",
        timeout_s=60,
    )


def kill_coordinator_and_restart(federation: LocalFederation) -> None:
    assert federation.coordinator is not None
    federation.coordinator.kill()
    federation.start_coordinator()


def package(federation: LocalFederation, out_dir: Path) -> None:
    federation.fl_server("package", DEFINITION, "--out", str(out_dir))


def validation() -> tuple[Any, Any]:
    return SPLITS.validation.x, SPLITS.validation.y
