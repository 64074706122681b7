"""Real agents, a real broker and a real coordinator: bad versions stop at the canary, which answers on meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest
from onnx import helper, numpy_helper

from fl_server.__main__ import main
from fl_server.fleet.roster import Roster
from fl_server.rollout.records import RolloutRecords
from fl_server.rollout.waves import Phase
from fl_server.rollout_status import list_words
from tests.simulators.agent import REPOSITORY, find_free_port
from tests.simulators.federation import Federation
from tests.simulators.hostile_models import build_model, build_slow
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_models import FEATURES, INPUT, OUTPUT, build_graph, save_version
from tests.simulators.waiting import wait_until

DEVICES = ("canary", "kitchen")
PLAN = """\
waves = [0, 100]
devices = ["canary"]
[probation]
seconds = {seconds}
min_agreement = 0.95
max_latency_ratio = {ratio}
"""
FIVE_TIMES = 22  # turns of a loop, beside one product
REFUSED = "rolled back and never tried again: it did not pass its probation; version 1 serves on"
SLICE = [0.0, 0.0, 0.0, 1.0]  # a fifth of what is asked, and where a version answers wrongly
OTHERS = [[1.0, 2.0, 3.0, 0.0], [2.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [4.0, 1.0, 1.0, 0.0]]


class Agent:
    """An enrolled device; a context that ends it."""

    def __init__(self, federation: Federation, device_id: str) -> None:
        self.directory = federation.directory / "bundles" / device_id
        command(federation, "enroll", device_id, "--model", "tiny", "--out", str(self.directory))
        port, self.log_path = find_free_port(), self.directory / "agent.log"
        self.url = f"http://127.0.0.1:{port}"
        environment = {"EDGE_AGENT_HTTP__PORT": str(port), "EDGE_AGENT_HTTP__UDS": str(self.directory / "s")}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", "run", "--config", str(self.directory / "edge-agent.toml")],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
                stderr=log,
            )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def serves(self) -> bool:
        assert self.process.poll() is None, self.log_path.read_text()
        try:
            return httpx.get(f"{self.url}/v2/models/tiny/ready").is_success
        except httpx.TransportError:
            return False

    def find_understudies(self) -> list[int]:
        """Return the processes that versions on probation are in."""
        command = ["pgrep", "-P", str(self.process.pid), "-f", "edge_agent.inference.understudy"]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()]


class Load:
    """Asks an agent without a pause; a context that ends."""

    def __init__(self, agent: Agent) -> None:
        self.answers, self.problems = 0, list[str]()
        self._agent, self._ended = agent, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        rows = [SLICE, *OTHERS]
        with httpx.Client() as client:
            while not self._ended.wait(0.005):
                row = rows[self.answers % len(rows)]
                request = {"inputs": [{"name": INPUT.name, "datatype": "FP32", "shape": [1, FEATURES], "data": row}]}
                answer = client.post(f"{self._agent.url}/v2/models/tiny/infer", json=request)
                outputs = answer.json()["outputs"][0]["data"] if answer.is_success else answer.text
                if outputs != [sum(row)] * 3:
                    self.problems.append(f"{row}: {outputs}")
                self.answers += 1


@pytest.fixture
def federation(tmp_path, template, monkeypatch):
    with Mosquitto(tmp_path) as broker, Federation(tmp_path / "fed", template, broker_port=broker.port) as federation:
        for name, value in federation.environment.items():
            monkeypatch.setenv(name, value)
        federation.start()
        federation.wait_for_log("connected to the broker")
        yield federation


def command(federation: Federation, *arguments: str) -> None:
    assert main([*arguments, "--config", str(federation.config_path)]) == 0


def build_wrong_on_a_slice() -> bytes:
    weight = np.ones((FEATURES, 3), np.float32)
    weight[3, 2] = 100
    node = helper.make_node("MatMul", [INPUT.name, "weight"], [OUTPUT.name])
    return build_model([node], numpy_helper.from_array(weight, "weight"))


def roll_out(federation: Federation, version: int, graph: bytes, **rules) -> None:
    folder, plan_path = federation.directory / f"tiny-{version}", federation.directory / "plan.toml"
    save_version(folder, version=version, graph=graph)
    plan_path.write_text(PLAN.format(**rules))
    command(federation, "rollout", "start", str(folder), "--plan", str(plan_path))


def wait_for_rollback(federation: Federation, version: int) -> str:
    """Return why."""

    federation.wait_for_log(f"tiny version {version} has ended, the fleet goes back to version 1", timeout_s=60)
    path = federation.directory / "coordinator.db"
    with Roster(path) as roster, RolloutRecords(path) as records:
        rollout = records.find("tiny")
        [word] = list_words(roster, rollout)
    assert (rollout.phase, word.device_id) == (Phase.ROLLED_BACK, "canary")
    return word.message


def crash(canary: Agent, load: Load) -> None:
    """End the process that the version is in when it has answered 100 requests."""
    wait_until(lambda: "version 4 answers in the shadow" in canary.log_path.read_text(), "the probation")
    before = load.answers
    wait_until(lambda: load.answers >= before + 100, "100 requests")
    [understudy] = canary.find_understudies()
    os.kill(understudy, signal.SIGSEGV)


def test_bad_versions_stop_at_the_canary_go_back_by_themselves_and_cost_no_request(federation):
    save_version(first := federation.directory / "tiny-1", version=1)
    command(federation, "release", str(first))
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(contextlib.closing(Agent(federation, device))) for device in DEVICES]
        wait_until(lambda: all(agent.serves() for agent in agents), "all agents to serve", timeout_s=60)
        load = stack.enter_context(Load(agents[0]))
        roll_out(federation, 2, build_slow(FIVE_TIMES), seconds=3600, ratio=3)
        assert "its median latency is" in wait_for_rollback(federation, 2)
        roll_out(federation, 3, build_wrong_on_a_slice(), seconds=2, ratio=100)
        assert wait_for_rollback(federation, 3) == REFUSED
        roll_out(federation, 4, build_graph(1).SerializeToString(), seconds=3600, ratio=100)
        crash(agents[0], load)
        assert wait_for_rollback(federation, 4) == REFUSED
        assert load.answers > 100
        assert load.problems == []
    with Roster(federation.directory / "coordinator.db") as roster:
        tried = {device: {event.version for event in roster.list_events(device)} - {None} for device in DEVICES}
    assert tried == {"canary": {1, 2, 3, 4}, "kitchen": {1}}
