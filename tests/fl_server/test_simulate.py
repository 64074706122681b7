"""Whole simulated runs: the real round driver, and processes of the device's own code."""

import dataclasses
import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fl_server.__main__ import main
from fl_server.errors import RunError
from fl_server.jobs import TrainRequest
from fl_server.packaging.architecture import Architecture
from fl_server.packaging.definitions import load_definition
from fl_server.packaging.export import export_architecture
from fl_server.simulation.data import load_samples
from fl_server.simulation.simulate import Engine, Simulation
from models.contract.privacy import TrainingPlan, Unit
from models.definitions.losses import build_target_spec
from tests.simulators.federation import DEFINITION

DEVICES, ROWS, ROUNDS = 3, 60, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a definition and the data of three devices."""
    directory = tmp_path_factory.mktemp("simulate")
    (directory / "sides.py").write_text(DEFINITION)
    generator = np.random.default_rng(0)
    for part, rows in (("train", ROWS), ("test", 20)):
        (directory / part).mkdir()
        for number in range(DEVICES):
            save_device(directory / part / f"device-{number}.npz", generator, rows)
    return directory


@pytest.fixture(scope="module")
def architecture(place: Path) -> Architecture:
    return export_architecture(load_definition(f"{place / 'sides.py'}:definition"), place / "architecture")


@pytest.fixture(scope="module")
def simulation(place: Path, architecture: Architecture) -> Simulation:
    definition = load_definition(f"{place / 'sides.py'}:definition")
    return Simulation(definition, architecture, place, lambda _line: None)


def save_device(path: Path, generator: np.random.Generator, rows: int, **changes: np.ndarray) -> None:
    x = generator.normal(size=(rows, 4)).astype(np.float32)
    np.savez(path, **{"x": x, "y": (x[:, 0] > 0).astype(np.int64), **changes})


def ask(*, rounds: int = ROUNDS, **changes: Any) -> TrainRequest:
    request = TrainRequest(
        model="sides",
        epsilon=Decimal(8),
        delta=Decimal("0.001"),
        sampling_rate=Decimal("0.25"),
        clipping_norm=Decimal(1),
        training=TrainingPlan(rounds=rounds, steps=5, expected_batch=Decimal(15), learning_rate=Decimal(1)),
    )
    return dataclasses.replace(request, **changes)


def run_once(simulation: Simulation, place: Path, *, seed: int | None, engine: Engine = "inline", **changes: Any):
    definition = load_definition(f"{place / 'sides.py'}:definition")
    train, test = (load_samples(place / part, definition, build_target_spec(definition)) for part in ("train", "test"))
    paths = {name: samples.path for name, samples in train.items()}
    return simulation.run(ask(**changes), paths, test, seed=seed, engine=engine)


def command(place: Path, report: Path, **options: object) -> list[str]:
    named = {
        "train": place / "train",
        "test": place / "test",
        "rounds": ROUNDS,
        "unit": "sample",
        "epsilon": 8,
        "delta": 0.001,
        "report": report,
        "expected-batch": 15,
        **options,
    }
    words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    return ["simulate", f"{place / 'sides.py'}:definition", *words]


def test_a_seed_repeats_a_run_to_the_last_bit_with_any_number_of_processes_and_nothing_else_does(
    simulation: Simulation, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for seed, processors in ((7, 1), (7, 3), (8, 3), (None, 3), (None, 3)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid, count=processors: set(range(count)))
        digests.append(run_once(simulation, place, seed=seed).parameters_digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_seed_repeats_cohorts_and_noise_of_the_device_unit_to_the_last_bit(
    simulation: Simulation, place: Path
) -> None:
    asked = {"unit": Unit.DEVICE, "sampling_rate": Decimal("0.7"), "epsilon": Decimal(50), "rounds": 4}
    results = [run_once(simulation, place, seed=seed, **asked) for seed in (7, 7, 8)]
    digests = [result.parameters_digest for result in results]
    assert digests[0] == digests[1] != digests[2]
    spent = [done.epsilon for done in results[0].rounds]
    assert 0 == spent[0] < spent[1] < spent[-1] <= 50


def test_local_parameters_fit_each_device_and_are_in_no_file_of_the_run(
    simulation: Simulation, architecture: Architecture, place: Path, tmp_path: Path
) -> None:
    """All points of one device are left and all of the other right: the bias can tell whose they are, no weight can."""
    personal = dataclasses.replace(architecture, training=dataclasses.replace(architecture.training, local=("bias",)))
    shutil.copyfile(place / "sides.py", tmp_path / "sides.py")
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for number in range(2):
            save_device(tmp_path / part / f"device-{number}.npz", generator, ROWS, y=np.full(ROWS, number))
    asked = {"sampling_rate": Decimal(1), "epsilon": Decimal(500), "delta": Decimal("0.3")}
    definition = load_definition(f"{place / 'sides.py'}:definition")
    assert min(run_once(simulation, tmp_path, seed=7, **asked).per_device) < 0.8
    simulation = Simulation(definition, personal, tmp_path, lambda _line: None)
    for unit in Unit:
        assert min(run_once(simulation, tmp_path, seed=7, unit=unit, **asked).per_device) > 0.8
        own = [file.read_bytes() for file in (tmp_path / "local").iterdir()]
        assert [len(values) for values in own] == [4 * 2] * 2
        assert own[0] != own[1]
        for file in (file for file in (tmp_path / "run").rglob("*") if file.is_file()):
            assert not any(values in file.read_bytes() for values in own)
            if file.suffix == ".safetensors":
                assert set(load_file(file)) == {"weight"}


def test_flowers_engine_runs_the_same_rounds_to_the_last_bit(simulation: Simulation, place: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra simulation")
    digests = {run_once(simulation, place, seed=7, engine=engine).parameters_digest for engine in ("inline", "ray")}
    assert len(digests) == 1


def test_updates_of_int8_count_as_those_of_float32_do(place: Path, tmp_path: Path) -> None:
    values = []
    for uplink in ("float32", "int8"):
        report = tmp_path / f"{uplink}.json"
        assert main(command(place, report, seed=3, uplink=uplink)) == 0
        values.append(json.loads(report.read_text())["metric"]["value"])
    assert values[1] == pytest.approx(values[0], abs=0.05)


def test_a_process_of_devices_that_fails_ends_the_run_with_its_words(simulation: Simulation, place: Path) -> None:
    definition = load_definition(f"{place / 'sides.py'}:definition")
    test = load_samples(place / "test", definition, build_target_spec(definition))
    with pytest.raises(RunError, match=r"No such file.*missing\.npz"):
        simulation.run(ask(), {"device-0": place / "missing.npz"}, test, seed=1)


def test_the_report_has_the_form_of_the_demo_and_says_that_seeded_noise_is_not_private(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(command(place, report, seed=3)) == 0
    document = json.loads(report.read_text())
    assert {key: document[key] for key in ("model", "devices", "unit", "delta")} == {
        "model": "sides",
        "devices": DEVICES,
        "unit": "sample",
        "delta": 0.001,
    }
    assert [row["round"] for row in document["versions"]] == [0, 1, 2]
    assert set(document["versions"][0]) == {"version", "round", "metric", "epsilon", "bytes_pushed", "promoted"}
    assert 0 < document["versions"][1]["epsilon"] < document["epsilon"] <= 8
    assert set(document) >= {"seconds", "requests", "agent_rss_mb", "training_rss_mb"}
    assert document["metric"]["name"] == "accuracy"
    assert document["metric"]["value"] == pytest.approx(np.mean(document["metric"]["per_device"]), abs=1e-3)
    assert (document["noise"]["seed"], document["noise"]["private"]) == (3, False)
    output = capsys.readouterr().out
    assert "not private" in document["noise"]["note"]
    assert "not private" in output
    assert f"round {ROUNDS}/{ROUNDS}: {DEVICES} of {DEVICES} devices" in output


UNEXPORTABLE = """\
from torch import nn
from models.definitions import ModelDefinition, TensorSpec

definition = ModelDefinition(
    name="sides",
    build=lambda: nn.Sequential(
        nn.Linear(4, 4),
        nn.Unflatten(1, (1, 2, 2)),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Flatten(),
        nn.Linear(16, 2),
    ),
    inputs=(TensorSpec("point", ("batch", 4), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
    labels=("left", "right"),
    batch=8,
)
"""


def test_a_model_whose_step_does_not_export_trains_with_opacus(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, report = tmp_path / "sides.py", tmp_path / "report.json"
    path.write_text(UNEXPORTABLE)
    assert main(["simulate", f"{path}:definition", *command(place, report, seed=3)[2:]]) == 0
    assert "devices train it with the Opacus engine: each needs edge-fl[opacus], and this definition" in caplog.text
    versions = json.loads(report.read_text())["versions"]
    assert versions[-1]["metric"] > max(versions[0]["metric"], 0.8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.1}, "--delta is 0.1, above 1/60"),
        ({"epsilon": 0.001, "delta": 1e-9}, "cannot be kept"),
        ({"expected-batch": 61}, "--expected-batch is 61, larger than the data"),
        ({"rounds": 0}, "rounds 0"),
        ({"unit": "device", "delta": 0.5}, "--delta is 0.5, above 1/3, one by the number of devices"),
        ({"unit": "device", "aggregation": "median", "byzantine": 1}, "cannot be combined with the device unit"),
        ({"unit": "device", "clipping-quantile": 0.5}, "adaptive clipping needs an expected cohort above"),
        ({"unit": "device", "clipping-quantile": 1}, "clipping quantile is 1, must be in (0, 1)"),
        ({"unit": "device", "epsilon": 0.001, "delta": 1e-9}, "cannot be kept"),
        ({"clipping-quantile": 0.5}, "a clipping quantile is of unit device"),
        ({"participation": "visible"}, "participation can be visible for unit device only"),
        ({"server-momentum": 0.5}, "use fedavgm"),
    ],
)
def test_a_plan_that_cannot_be_met_is_refused_in_words(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], words: str
) -> None:
    assert main(command(place, tmp_path / "report.json", **options)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert not captured.out  # nothing was begun
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((5, 3), np.float32)}, ["x has shape (5, 3)", "'batch', 4"]),
        ({"y": np.full(5, 2)}, ["y must hold classes, whole numbers from 0 to 1"]),
        ({"y": np.full(5, 0.5)}, ["y must hold classes, whole numbers from 0 to 1"]),
        ({"y": np.zeros((5, 2))}, ["y has shape (5, 2)", "('batch',)"]),
        ({"x": np.full((5, 4), np.nan)}, ["x holds NaN"]),
    ],
)
def test_data_that_does_not_fit_is_refused_with_file_and_expectation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, np.ndarray], words: list[str]
) -> None:
    save_device(tmp_path / "odd.npz", np.random.default_rng(0), 5, **changes)
    assert main(command(place, tmp_path / "report.json", train=tmp_path)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in [str(tmp_path / "odd.npz"), *words]), error


def test_a_folder_without_npz_is_refused_by_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "report.json", test=tmp_path)) == 2
    assert f"{tmp_path} holds no .npz file" in capsys.readouterr().err
