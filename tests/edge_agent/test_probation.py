"""A whole agent with a version on probation: what happens to the version is no request's business."""

import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from edge_agent.updates.slots import TRIES, Slots
from models.contract.terms import ProbationRules
from tests.simulators.agent import AgentProcess, install_version, stage_version
from tests.simulators.waiting import wait_until

REQUEST = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}]}


@pytest.fixture
def device(tmp_path: Path) -> AgentProcess:
    """An agent on version 1."""
    device = AgentProcess(tmp_path)
    device.state_dir.mkdir()
    install_version(device.state_dir)
    return device


def is_on_probation(device: AgentProcess, times: int = 1) -> bool:
    is_in_shadow = device.log_path.read_text().count("version 2 answers in the shadow") == times
    return is_in_shadow and bool(device.status()["update"] == "probation")


def find_understudy(device: AgentProcess) -> int | None:
    """Return the process that the version on probation is in."""
    found = subprocess.run(
        ["pgrep", "-P", str(device.pid), "-f", "edge_agent.inference.understudy"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(found.stdout.split()[0]) if found.stdout else None


def ask(device: AgentProcess) -> float:
    answer = httpx.post(f"{device.url}/v2/models/tiny/infer", json=REQUEST).raise_for_status()
    return float(answer.json()["outputs"][0]["data"][0])


def test_power_cut_meanwhile_costs_the_version_nothing_and_a_crash_of_it_costs_no_answer(device: AgentProcess) -> None:
    stage_version(device.state_dir, 2, rules=ProbationRules(seconds=3600))
    with device:
        wait_until(lambda: is_on_probation(device), "the probation")
        assert ask(device) == 4
        orphan = find_understudy(device)
        device.kill()
        assert orphan is not None
        wait_until(lambda: not Path(f"/proc/{orphan}").exists(), "the end of a process without its agent")
        trial = Slots(device.state_dir / "slots").trial
        assert trial is not None
        assert trial.tries_left == TRIES
        device.start()
        wait_until(lambda: is_on_probation(device, 2), "the probation again")
        understudy = find_understudy(device)
        assert understudy is not None
        os.kill(understudy, signal.SIGKILL)

        def has_answered() -> bool:
            assert ask(device) == 4
            return bool(device.status()["update"] == "idle")

        wait_until(has_answered, "the verdict")
        assert ask(device) == 4
    slots = Slots(device.state_dir / "slots")
    assert (slots.trial, len(slots.rejected)) == (None, 1)
    log = device.log_path.read_text()
    assert "version 2 did not pass its probation: the process it was tried in was ended by SIGKILL" in log
    assert "FAILED: rolled back and never tried again: it did not pass its probation; version 1 serves on" in log


def test_version_that_passes_takes_over_without_a_failed_request(device: AgentProcess) -> None:
    stage_version(device.state_dir, 2, rules=ProbationRules(seconds=1))
    answers = set()
    with device:

        def has_changed() -> bool:
            answers.add(ask(device))
            return 8.0 in answers

        wait_until(has_changed, "the version on probation to serve")
    assert answers == {4.0, 8.0}
