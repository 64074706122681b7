"""The systemd units are closed, and both programs say what `Type=notify` and `WatchdogSec` ask of them."""

import re
import shutil
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from fl_server.doctor import examine
from tests.simulators.agent import AgentProcess
from tests.simulators.federation import Federation, run_command
from tests.simulators.notify_socket import NotifySocket
from tests.simulators.waiting import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES = [DEPLOY / "edge/edge-agent.service", DEPLOY / "server/fl-server.service"]
UNITS = [*SERVICES, DEPLOY / "server/fl-broker.service", DEPLOY / "server/fl-proxy.service"]
EXPOSURE_LIMIT = 3.0
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


def analyze(*arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_less_exposed_than_the_limit(unit: Path) -> None:
    said = analyze("security", "--offline=yes", str(unit))
    rating = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert rating is not None, said
    assert float(rating[1]) < EXPOSURE_LIMIT


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_every_line_of_a_unit(unit: Path) -> None:
    said = analyze("verify", "--man=no", str(unit)).splitlines()
    assert [line for line in said if "is not executable: No such file" not in line] == []


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_a_unit_survives_that_the_kernel_kills_a_training_process(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    assert {"Type=notify", "DynamicUser=yes", "OOMPolicy=continue", "Restart=always"} <= set(lines)
    assert any(line.startswith("WatchdogSec=") for line in lines)


def test_the_agent_is_ready_once_its_api_answers_and_feeds_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NotifySocket(tmp_path / "n", watchdog_s=0.3) as systemd:
        for name, value in systemd.environment.items():
            monkeypatch.setenv(name, value)
        with AgentProcess(tmp_path / "device") as device:
            wait_until(lambda: systemd.has_heard("READY=1"), "the agent to be ready")
            assert httpx.get(f"{device.url}/v2/health/live").is_success
            wait_until(lambda: systemd.has_heard("WATCHDOG=1", times=3), "the watchdog to be fed")
            assert not systemd.has_heard("STOPPING=1")
        assert systemd.has_heard("STOPPING=1")


def test_the_coordinator_is_ready_once_its_superlink_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command("init", str(tmp_path / "template")).returncode == 0
    with (
        NotifySocket(tmp_path / "n", watchdog_s=0.3) as systemd,
        Federation(tmp_path / "federation", tmp_path / "template", broker_port=1) as federation,
    ):
        for name, value in systemd.environment.items():
            monkeypatch.setenv(name, value)
        federation.start()
        wait_until(lambda: systemd.has_heard("READY=1"), "the coordinator to be ready", timeout_s=60)
        assert federation.process is not None
        monkeypatch.setenv("FL_SERVER_SUPERLINK__PORT", str(federation.superlink_port))
        (service,) = [each for each in examine(federation.config_path, now=datetime.now(UTC)) if each.what == "service"]
        assert (service.level, "SuperLink answers" in service.found) == ("ok", True)
        wait_until(lambda: systemd.has_heard("WATCHDOG=1", times=3), "the watchdog to be fed")
        federation.process.send_signal(signal.SIGTERM)
        assert federation.process.wait(30) == 0
        assert systemd.has_heard("STOPPING=1")
