"""Rows by column through a real agent: one way in for samples, predictions and batches."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models.tensors.features import Feature, build_inputs
from models.tensors.spec import TensorSpec
from tests.simulators.agent import REPOSITORY, AgentProcess, install_version
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.observer import Observer
from tests.simulators.samples import open_device_samples
from tests.simulators.tiny_models import INPUT
from tests.simulators.waiting import wait_until

FEATURES = (
    Feature("age", scale=(50, 10)),
    Feature("pain", one_hot=("no", "yes")),
    Feature("street", impute="", hash=1),
)
LABEL = TensorSpec("y", ("batch",), "int64")
ROWS = [{"age": 10.1 + number, "pain": "yes", "street": "Raw-Secret"} for number in range(700)]
RULES = "[samples.fields.street]\nhash = true\n"
SAMPLES = '[samples]\nconsent = true\nmqtt_topic = "sensor/heart"\n'


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    directory = tmp_path_factory.mktemp("rows")
    with Mosquitto(directory) as broker:
        device = AgentProcess(directory / "device", broker_port=broker.port, extra=SAMPLES + RULES)
        device.state_dir.mkdir()
        install_version(device.state_dir, trainable=True, features=FEATURES)
        with device:
            device.broker = broker
            yield device


def edge_agent(device: AgentProcess, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments, "--uds", str(device.uds_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
        check=False,
    )


def write_rows(path: Path, **more: object) -> Path:
    path.write_text("".join(json.dumps(row | more) + "\n" for row in ROWS))
    return path


def test_rows_become_the_same_bits_over_the_socket(device: AgentProcess) -> None:
    answer = device.ask("POST", "/v1/rows", json={"rows": ROWS}).json()["inputs"]
    (tensor,) = answer
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("features", "FP32", [700, 4])
    expected = build_inputs(FEATURES, (INPUT,), ROWS)["features"]
    assert np.array(tensor["data"], np.float32).tobytes() == expected.tobytes()
    told = device.ask("GET", "/v2/models/tiny").json()["parameters"]
    assert told["columns"] == ["age", "pain", "street"]


def test_rows_are_refused_by_column(device: AgentProcess) -> None:
    for rows, said in (
        ([{"age": "x"}], "row 0: column 'age'"),
        ([], "at least one"),
        ([[1]], "names of their columns"),
    ):
        refused = device.ask("POST", "/v1/rows", json={"rows": rows})
        assert refused.status_code == 400
        assert said in refused.json()["error"]


def test_file_of_rows_is_kept_predicted_and_inferred_alike(tmp_path: Path, device: AgentProcess) -> None:
    path = write_rows(tmp_path / "s.jsonl", y="high")
    before = device.status()["samples"]
    kept = edge_agent(device, "ingest", str(path))
    assert kept.stdout == f"700 samples of {path} are kept on this device\n"
    with open_device_samples(device.state_dir) as store:
        x, y = store.load(INPUT, LABEL)
    expected = build_inputs(FEATURES, (INPUT,), ROWS)["features"]
    assert x[before:].tobytes() == expected.tobytes()
    assert set(y[before:]) == {2}
    assert (device.state_dir / "fields.key").stat().st_mode & 0o777 == 0o600
    for file in device.state_dir.glob("samples.db*"):
        assert b"Raw-Secret" not in file.read_bytes()

    output = tmp_path / "o.jsonl"
    inferred = edge_agent(device, "infer", "--input", str(path), "--output", str(output), "--json")
    assert json.loads(inferred.stdout) == {
        "rows": 700,
        "resumed": 0,
        "model": "tiny",
        "version": "1",
        "output": str(output),
    }
    logits = [json.loads(line)["logits"] for line in output.read_text().splitlines()]
    np.testing.assert_allclose(logits, expected.sum(1, keepdims=True).repeat(3, 1), rtol=1e-6)

    one = edge_agent(device, "predict", "-", "--json", stdin=json.dumps(ROWS[0]))
    assert json.loads(one.stdout)["outputs"][0]["data"] == logits[0]


def test_sensor_on_the_local_broker_is_listened_to(device: AgentProcess) -> None:
    wait_until(lambda: device.status()["connected"], "the device to connect")
    before = device.status()
    with Observer(device.broker.port) as sensor:
        document = {"samples": [{"x": ROWS[0], "y": 1}, {"x": ROWS[1], "y": "low"}]}
        for payload in (json.dumps(document).encode(), b"junk", b'{"samples": [{"x": {}, "y": 1}]}'):
            sensor.publish("sensor/heart", payload)
        wait_until(lambda: device.status()["samples"] == before["samples"] + 2, "the sensor's samples")
        wait_until(lambda: device.status()["ignored_messages"] >= before["ignored_messages"] + 2, "junk to be counted")


def test_failed_ingest_says_how_far_it_came(tmp_path: Path, device: AgentProcess) -> None:
    (tmp_path / "s.csv").write_text("age,pain,street,y\n1,no,,0\nold,no,,0\n")
    failed = edge_agent(device, "ingest", str(tmp_path / "s.csv"))
    assert failed.returncode == 1
    assert "row 2: column 'age': expected a finite number (0 samples of" in failed.stderr
    (tmp_path / "n.csv").write_text("1,2,3,4,0\n")
    assert "names of their columns" in edge_agent(device, "ingest", str(tmp_path / "n.csv")).stderr
