import importlib.util
import os
import shutil
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from fl_server.errors import DefinitionError, ServerError, UsageError
from fl_server.evaluation.evaluate import measure_quality
from fl_server.inference import open_graph
from fl_server.packaging.architecture import load_architecture, update_wishes
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.tflite import PYTHON_VARIABLE, TfliteExporter, build_exporter
from models.contract.encoding import build_digest
from models.contract.manifest import Lineage, parse_manifest
from models.definitions.digits import build_module
from models.tensors.delta import apply_delta
from models.tensors.spec import TensorSpec

needs_exporter = pytest.mark.skipif(
    not os.environ.get(PYTHON_VARIABLE) and importlib.util.find_spec("litert_torch") is None,
    reason=f"litert-torch is not installed: pip install 'edge-fl[export-tflite]', or set {PYTHON_VARIABLE}",
)
DEFINITIONS_FILE = """\
from torch import nn
import torch
from models.definitions import ModelDefinition, TensorSpec


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 2)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


def define(name, build, shape, outputs, dtype="float32"):
    return ModelDefinition(
        name=name, build=build, loss="cross_entropy", metric="accuracy", batch=8,
        inputs=(TensorSpec("features", ("batch", *shape), dtype),),
        outputs=(TensorSpec("logits", ("batch", outputs), "float32"),),
    )


text = define("text", Text, (7,), 2, dtype="int64")
mlp = define("mlp", lambda: nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3)), (13,), 3)
wider = define("mlp", lambda: nn.Sequential(nn.Linear(13, 17), nn.ReLU(), nn.Linear(17, 3)), (13,), 3)
other = define("mlp", lambda: nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3)), (13,), 3)
sorting = define("mlp", lambda: Sorting(), (13,), 3)


class Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3)])

    def named_parameters(self, *args, **kwargs):
        return self.layers.named_parameters(*args, **kwargs)

    def load_state_dict(self, state, **kwargs):
        return self.layers.load_state_dict(state, **kwargs)

    def forward(self, x):
        return self.layers[2](torch.relu(self.layers[0](x))) + torch.linalg.qr(x.T @ x)[0].sum() * 0
"""


@pytest.fixture
def definitions_path(tmp_path):
    path = tmp_path / "definitions.py"
    path.write_text(DEFINITIONS_FILE)
    return path


def package(exported, exporter, out_dir, measure=lambda inference, exact: None, *, parameters=None, running=()):
    return package_version(
        exported.architecture,
        parameters=parameters or exported.build_parameters(0),
        version=1,
        calibration=np.concatenate([exported.build_data(seed)[0] for seed in range(8)]),
        tools=Tools(measure=measure, tflite=exporter, running=running),
        lineage=Lineage(),
        privacy=None,
        out_dir=out_dir,
    )


@needs_exporter
def test_litert_version_names_its_tensors_as_the_definition_and_stays_close_to_torch(
    exports, definitions_path, tmp_path
):
    exported = exports("mlp")
    x, y = exported.build_data(20)
    manifest = package(
        exported,
        build_exporter(f"{definitions_path}:mlp"),
        tmp_path / "1",
        measure=lambda inference, exact: measure_quality(inference, exact, x, y, "accuracy"),
    )
    assert parse_manifest((tmp_path / "1/manifest.json").read_bytes()) == manifest
    assert (manifest.runtime, manifest.inputs, manifest.outputs) == (
        "tflite",
        exported.definition.inputs,
        exported.definition.outputs,
    )
    assert set(manifest.files) == {"inference.tflite", "train_step.onnx", "evaluate.onnx", "parameters.safetensors"}
    path = tmp_path / "1/inference.tflite"
    assert manifest.files["inference.tflite"].digest == build_digest(path.read_bytes())
    answers = open_graph(path).run({"features": x})["logits"]
    assert answers.shape == (8, 3), "a fixed batch of one runs row by row"
    assert manifest.quality.logit_deviation < Decimal("0.05")
    sizes = {name: getattr(manifest.measured, name).size_bytes for name in ("float32", "int8")}
    assert sizes[manifest.measured.packaged] == min(sizes.values()) == len(path.read_bytes())

    exporter, running = build_exporter(f"{definitions_path}:mlp"), (tmp_path / "1",)
    again = package(exported, exporter, tmp_path / "2", running=running)
    assert again.files == manifest.files, "the same parameters and calibration give the same bytes"
    assert again.deltas == ()

    moved = {name: (array * 1.0005).astype(np.float32) for name, array in exported.build_parameters(0).items()}
    (delta,) = package(exported, exporter, tmp_path / "3", parameters=moved, running=running).deltas
    assert delta.base == manifest.files["inference.tflite"].digest
    rebuilt = apply_delta(
        path.open("rb"), (tmp_path / "3" / delta.name).read_bytes(), size_bytes=path.stat().st_size, block_bytes=1000
    )
    assert b"".join(rebuilt) == (tmp_path / "3/inference.tflite").read_bytes()


@needs_exporter
def test_indices_are_int32_at_the_door_and_int64_where_the_device_trains(exports, definitions_path, tmp_path):
    exported = exports("text")
    manifest = package(exported, build_exporter(f"{definitions_path}:text"), tmp_path / "1")
    assert manifest.inputs == (TensorSpec("features", ("batch", 7), "int32"),)
    assert manifest.training_input == TensorSpec("features", ("batch", 7), "int64")
    x, _ = exported.build_data(1)
    answers = open_graph(tmp_path / "1/inference.tflite").run({"features": x.astype(np.int32)})["logits"]
    assert answers.shape == (8, 2)


@needs_exporter
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wider", DefinitionError, "has other parameters than its exported architecture"),
        ("other", UsageError, "mlp: the definition no longer is the one that was exported; export it anew"),
        ("sorting", DefinitionError, "mlp: litert-torch cannot convert the module: "),
    ],
)
def test_module_that_cannot_be_what_was_exported_is_refused_in_words(
    exports, definitions_path, tmp_path, name, error, message
):
    with pytest.raises(error, match=message) as caught:
        package(exports("mlp"), build_exporter(f"{definitions_path}:{name}"), tmp_path / "1")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["definitions.py"]


def test_wishes_of_a_definition_are_taken_over_without_a_new_export(exports, tmp_path):
    shutil.copytree(exports("mlp").architecture.directory, tmp_path / "mlp")
    architecture = load_architecture(tmp_path / "mlp")
    wished = replace(exports("mlp").definition, prefer="speed", logit_tolerance=None)
    assert update_wishes(architecture, wished) == load_architecture(tmp_path / "mlp")
    assert load_architecture(tmp_path / "mlp").prefer == "speed"


def test_python_without_the_exporter_is_named_with_what_to_install(tmp_path):
    if importlib.util.find_spec("litert_torch") is not None:
        pytest.skip("litert-torch is installed here")
    exporter = TfliteExporter(definition="models.definitions.digits:definition", python=sys.executable)
    parameters = {name: value.detach().numpy() for name, value in build_module().named_parameters()}
    with pytest.raises(UsageError, match=r"has no litert_torch: pip install 'edge-fl\[export-tflite\]', or let"):
        exporter.export(parameters, np.zeros((2, 1, 8, 8), np.float32), tmp_path)


@pytest.mark.parametrize(
    ("python", "error", "message"),
    [("/nowhere/python", UsageError, "cannot be started"), ("/bin/false", ServerError, "ended with code 1")],
)
def test_python_that_cannot_do_it_is_named(tmp_path, python, error, message):
    exporter = TfliteExporter(definition="models.definitions.digits:definition", python=python)
    with pytest.raises(error, match=message):
        exporter.export({}, np.zeros((2, 1, 8, 8), np.float32), tmp_path)


def test_exporter_is_found_by_the_environment_variable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PYTHON_VARIABLE, "/opt/litert/bin/python")
    assert build_exporter("heart.py:definition") == TfliteExporter(
        definition=f"{tmp_path}/heart.py:definition", python="/opt/litert/bin/python"
    )
    monkeypatch.delenv(PYTHON_VARIABLE)
    assert build_exporter("package.module:name") == TfliteExporter(
        definition="package.module:name", python=sys.executable
    )
