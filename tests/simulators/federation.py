"""A real coordinator process, and devices that speak MQTT and Flower but train nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import paho.mqtt.client as paho
import psutil
from paho.mqtt.enums import CallbackAPIVersion

from models.contract.encoding import build_json
from models.contract.messages import Event, EventKind, Status
from tests.simulators.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
TEACHER_PROGRAM = Path(__file__).with_name("teacher.py")
FLEET, MODEL = "demo", "sides"
DEFINITION = """\
from torch import nn
from models.definitions import ModelDefinition, TensorSpec

definition = ModelDefinition(
    name="sides",
    build=lambda: nn.Linear(4, 2),
    inputs=(TensorSpec("point", ("batch", 4), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
    labels=("left", "right"),
    batch=8,
)
"""
# What tells left from right: the weight (2, 4). The bias is local: it is released as it was packaged, and never travels.
SOLUTION, BIAS = np.array([-2, 0, 0, 0, 2, 0, 0, 0], np.float32), np.array([0.3, 0.3], np.float32)


def run_command(*arguments: str, environment: dict[str, str] | None = None, cwd: Path | None = None):
    """Run `fl-server` with `arguments` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fl_server", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def create_template(directory: Path) -> None:
    """Create a federation whose model answers everything wrongly, packaged as version 1 in `v1`."""
    from safetensors.numpy import save_file

    assert run_command("init", str(directory), "--fleet", FLEET).returncode == 0
    (directory / "sides.py").write_text(DEFINITION.replace("batch=8", 'local=("bias",),\n    batch=8'))
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.savez(directory / "validation.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    with (directory / "fl-server.toml").open("a") as config:
        config.write('\n[models.sides]\ndefinition = "sides.py:definition"\nvalidation = "validation.npz"\n')
    save_file({"weight": -SOLUTION.reshape(2, 4), "bias": BIAS}, directory / "wrong.safetensors")
    done = run_command(
        *("package", f"{directory / 'sides.py'}:definition", "--config", str(directory / "fl-server.toml")),
        *("--parameters", str(directory / "wrong.safetensors"), "--out", str(directory / "v1")),
    )
    assert done.returncode == 0, done.stderr


class Federation:
    """A coordinator's directory and process; a context that ends what it started."""

    def __init__(self, directory: Path, template: Path, *, broker_port: int) -> None:
        shutil.copytree(template, directory)
        self.directory, self.broker_port = directory, broker_port
        self.config_path, self.log_path = directory / "fl-server.toml", directory / "coordinator.log"
        self.superlink_port = find_free_port()
        self.environment = {
            "FL_SERVER_PROXY__USED": "false",
            "FL_SERVER_BROKER__PORT": str(broker_port),
            "FL_SERVER_BROKER__TLS": "false",
            "FL_SERVER_SUPERLINK__PORT": str(self.superlink_port),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.devices: list[SimulatedDevice] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for device in self.devices:
            device.close()
        self.kill()

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fl_server", "run", "--config", str(self.config_path)],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.process = None
        return code

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_command(*arguments, "--config", str(self.config_path), environment=self.environment)

    def find_children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_log(self, text: str, *, timeout_s: float = 60.0) -> None:
        def is_there() -> bool:
            assert self.process is None or self.process.poll() is None, self.log_path.read_text()
            return text in self.log_path.read_text()

        wait_until(is_there, f"{text!r} in {self.log_path}", timeout_s=timeout_s)

    def add_device(self, device_id: str, *, fraction: float | str = 1.0) -> "SimulatedDevice":
        """Enrol a device and bring it online; woken, it answers with `fraction` of the way to the solution.

        A `fraction` of "silent" never answers.
        """
        bundle = self.directory / "bundles" / device_id
        done = self.command("enroll", device_id, "--out", str(bundle))
        assert done.returncode == 0, done.stderr
        device = SimulatedDevice(self, device_id, bundle, fraction)
        self.devices.append(device)
        return device


class SimulatedDevice:
    """Says that it is online, and starts a teacher when it is woken."""

    def __init__(self, federation: Federation, device_id: str, bundle: Path, fraction: float | str) -> None:
        self.device_id, self.received, self.teacher = device_id, list[tuple[str, bytes]](), None
        self.excuses: Iterator[EventKind] = iter(())  # said, one a wake command, in place of training
        self._federation, self._bundle, self._fraction = federation, bundle, fraction
        self._prefix = f"fl/v1/{FLEET}/device/{device_id}"
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=device_id, protocol=paho.MQTTv5)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", federation.broker_port)
        self._client.loop_start()

    @property
    def wakes(self) -> list[dict[str, Any]]:
        """The wake commands received, opened without a look at their signature."""
        return [json.loads(json.loads(payload)["payload"]) for payload in self.commands]

    @property
    def commands(self) -> list[bytes]:
        return [payload for topic, payload in self.received if topic.endswith("/command")]

    @property
    def acknowledged(self) -> list[str]:
        payloads = [payload for topic, payload in self.received if topic.endswith("/ack")]
        return [event_id for payload in payloads for event_id in json.loads(payload)["ids"]]

    def say(self, event: Event) -> None:
        self._client.publish(f"{self._prefix}/event", build_json(event), qos=1)

    def say_online(self, *, online: bool) -> None:
        status = Status(sent_at=1.0, online=online, agent="0.1", model=MODEL, trains=True)
        self._client.publish(f"{self._prefix}/status", build_json(status), qos=1, retain=True)

    def kill_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.kill()
            self.teacher.wait()
            self.teacher = None

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        self.kill_teacher()

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        client.subscribe([(f"{self._prefix}/{channel}", 1) for channel in ("command", "ack")])
        self.say_online(online=True)

    def _on_message(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        self.received.append((message.topic, message.payload))
        is_asleep = self.teacher is None or self.teacher.poll() is not None
        if not message.topic.endswith("/command"):
            return
        if excuse := next(self.excuses, None):
            self._excuse(excuse)
        elif is_asleep:
            self.teacher = subprocess.Popen(
                [
                    *(sys.executable, str(TEACHER_PROGRAM), f"127.0.0.1:{self._federation.superlink_port}"),
                    *(str(self._bundle / "ca.pem"), str(self._bundle / "node.key"), str(self._fraction)),
                ]
            )

    def _excuse(self, kind: EventKind) -> None:
        wakes = self.wakes
        name = f"{kind}-{len(wakes)}"
        self.say(Event(id=name, sent_at=1.0, kind=kind, message="not this time", run=wakes[-1]["run"]))
        self.say_online(online=True)  # as an agent does with every event
