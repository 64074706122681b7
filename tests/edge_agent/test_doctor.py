"""`edge-agent doctor` on real devices: well, broken in one place, and running."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edge_agent.__main__ import main
from edge_agent.updates.floors import Floors
from models.contract.encoding import build_json
from tests.simulators.agent import AgentProcess, install_version
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.waiting import wait_until


@pytest.fixture
def device(tmp_path: Path) -> AgentProcess:
    with Mosquitto(tmp_path) as broker:
        device = AgentProcess(tmp_path / "device", broker_port=broker.port)
        device.state_dir.mkdir(mode=0o750)
        install_version(device.state_dir)
        yield device


def examine(device: AgentProcess, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--config", str(device.config_path), "--json"])
    return code, {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_device_that_is_well_passes_before_it_runs_and_while_it_runs(
    device: AgentProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    code, findings = examine(device, capsys)
    assert code == 0, findings
    assert findings["version"]["found"] == "tiny 1 verifies, loads and answers"
    assert findings["service"]["level"] == "warn"
    with device:
        wait_until(lambda: device.status()["connected"], "the device to connect")
        code, findings = examine(device, capsys)
        assert device.status()["connected"], "the doctor has replaced the device at its broker"
    assert (code, findings["service"]["found"]) == (0, "serves version 1, connected")
    assert "version" not in findings


def test_each_thing_that_is_broken_is_a_line_with_what_to_do(
    device: AgentProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    floors = Floors(roles={}, signed_at=datetime.now(UTC) + timedelta(days=1))
    (device.state_dir / "tuf-floors.json").write_bytes(build_json(floors))
    (device.directory / "root.json").unlink()
    (device.state_dir / "samples.key").write_bytes(bytes(32))
    (device.state_dir / "samples.key").chmod(0o644)
    next((device.state_dir / "slots" / "a").glob("*.onnx")).write_bytes(b"damaged")
    code, findings = examine(device, capsys)
    failed = {what for what, finding in findings.items() if finding["level"] == "fail"}
    assert (code, failed) == (1, {"clock", "root of trust", "key samples.key", "version"})
    assert all(findings[what]["advice"] for what in failed)


def test_a_configuration_that_cannot_be_used_is_the_only_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edge-agent.toml"
    path.write_text('flet = "f"\n')
    assert main(["doctor", "--config", str(path)]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("fail  configuration")
    assert ("'flet'" in said.out, len(said.out.splitlines())) == (True, 1)
    assert said.err == "edge-agent: 1 of 1 checks failed: configuration\n"
