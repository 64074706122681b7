import signal
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_server.errors import UsageError
from fl_server.evaluation.evaluate import Evaluator, measure_quality
from fl_server.inference import open_graph
from fl_server.packaging.architecture import load_parameters
from fl_server.packaging.export import export_architecture
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.precision import StrayingError, compute_deviation
from models.contract.encoding import build_digest
from models.contract.golden import explain_straying, parse_golden
from models.contract.manifest import Figures, Lineage, Quality, parse_manifest
from models.definitions import ModelDefinition, TensorSpec
from models.definitions.digits import definition, load_splits

QUALITY = Quality(
    metric="accuracy", value=Decimal("0.5"), samples=2, float_value=Decimal("0.5"), logit_deviation=Decimal(0)
)


FIGURES = Figures(size_bytes=1000, row_us=Decimal(9), batch_us=Decimal(90))


def measure_size(path, rows):
    """Figures without a clock: what is compared byte for byte holds none of a clock's."""
    return replace(FIGURES, size_bytes=path.stat().st_size)


def build_tools(measure=lambda inference, exact: QUALITY, **others):
    return Tools(measure=measure, measure_figures=measure_size, **others)


def package(exported, out_dir, **changes):
    arguments = {
        "parameters": exported.build_parameters(0),
        "version": 1,
        "calibration": exported.build_data(1)[0],
        "tools": build_tools(),
        "lineage": Lineage(),
        "privacy": None,
        "out_dir": out_dir,
    }
    return package_version(exported.architecture, **(arguments | changes))


def read(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_version_is_defined_byte_for_byte_by_its_manifest(exported, tmp_path):
    manifest = package(exported, tmp_path / "1", lineage=Lineage(run="r-1", round=3))
    files = read(tmp_path / "1")
    assert parse_manifest(files.pop("manifest.json")) == manifest
    assert set(manifest.all_files) == set(files)
    for name, entry in manifest.all_files.items():
        assert (entry.digest, entry.size_bytes) == (build_digest(files[name]), len(files[name]))
    assert manifest.lineage.round == 3
    assert manifest.quality == QUALITY
    stored = load_parameters(tmp_path / "1" / "parameters.safetensors", exported.architecture.training.layout)
    assert all(np.array_equal(stored[name], value) for name, value in exported.build_parameters(0).items())
    session = ort.InferenceSession(tmp_path / "1" / manifest.inference_name, providers=["CPUExecutionProvider"])
    assert [(tensor.name, tensor.shape) for tensor in session.get_inputs()] == [
        (spec.name, list(spec.shape)) for spec in manifest.inputs
    ]


def test_golden_samples_are_rows_of_the_calibration_data_and_what_the_packaged_graph_answers(exported, tmp_path):
    calibration, _ = exported.build_data(1)
    manifest = package(exported, tmp_path / "1", calibration=calibration)
    golden = parse_golden((tmp_path / "1" / "golden.bin").read_bytes(), manifest)
    (name,) = golden.inputs
    assert all((row == calibration).reshape(len(calibration), -1).all(axis=1).any() for row in golden.inputs[name])
    path = tmp_path / "1" / manifest.inference_name
    assert explain_straying(replace(golden, tolerance=1e-9), open_graph(path).run(golden.inputs)) is None


def test_same_parameters_and_calibration_give_the_same_bytes(exported, tmp_path):
    package(exported, tmp_path / "1")
    package(exported, tmp_path / "again")
    assert read(tmp_path / "1") == read(tmp_path / "again")


def test_packaged_outputs_stay_close_to_the_float_graph(exported, tmp_path):
    x, _ = exported.build_data(2)
    strayed = []

    def compare(inference_path, float_path):
        packaged, exact = (
            ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"features": x})[0]
            for path in (inference_path, float_path)
        )
        assert np.abs(packaged - exact).mean() < 0.1 * np.abs(exact).max()
        strayed.append(float(np.abs(packaged - exact).max()))
        return QUALITY

    manifest = package(exported, tmp_path / "1", tools=build_tools(compare))
    assert (strayed[0] > 0) == (manifest.measured.packaged == "int8"), "said to be int8, but nothing was quantized"


def measure_int8_smaller(path, rows):
    return replace(FIGURES, size_bytes=1000 if path.name.startswith("int8") else 2000)


def test_version_that_strays_beyond_the_tolerance_of_its_definition_is_not_packaged(exported, tmp_path):
    assert exported.definition.logit_tolerance == 0.1
    tools = Tools(measure=lambda inference, exact: QUALITY, measure_figures=measure_int8_smaller)
    manifest = package(exported, tmp_path / "1", tools=tools)
    assert manifest.measured.packaged == "int8"
    assert manifest.measured.int8.size_bytes == 1000

    strict = replace(exported, architecture=replace(exported.architecture, logit_tolerance=1e-9))
    with pytest.raises(StrayingError, match=r"the packaged outputs stray from the module's by 0\.0\d\d of") as caught:
        package(strict, tmp_path / "2", tools=tools)
    assert caught.value.quality == QUALITY
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    unchecked = replace(exported, architecture=replace(exported.architecture, logit_tolerance=None))
    assert package(unchecked, tmp_path / "3", tools=tools).files == manifest.files


def test_int8_sums_never_saturate_on_processors_that_sum_in_sixteen_bits(exported, tmp_path):
    tools = Tools(measure=lambda inference, exact: QUALITY, measure_figures=measure_int8_smaller)
    package(exported, tmp_path / "1", tools=tools)
    x, _ = exported.build_data(1)
    answers = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level  # without, int8 is computed in float and cannot saturate
        session = ort.InferenceSession(tmp_path / "1/inference.onnx", options, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"features": x})[0])
    assert compute_deviation(answers[1], answers[0]) < 0.01


def test_failed_packaging_leaves_nothing(exports, tmp_path):
    def fail(inference_path, float_path):
        raise RuntimeError("measured nothing")

    with pytest.raises(RuntimeError, match="measured nothing"):
        package(exports("mlp"), tmp_path / "1", tools=build_tools(fail))
    assert not list(tmp_path.iterdir())


def test_packaging_that_is_killed_leaves_no_version(exports, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
import numpy as np
from fl_server.packaging.architecture import load_architecture
from fl_server.packaging.package import Tools, package_version
from models.contract.manifest import Lineage
architecture = load_architecture(Path({str(exports("mlp").architecture.directory)!r}))
package_version(
    architecture, parameters=architecture.load_initial_parameters(), version=1, lineage=Lineage(), privacy=None,
    calibration=np.zeros((1, 13), np.float32), out_dir=Path({str(tmp_path)!r}, "1"),
    tools=Tools(measure=lambda inference, exact: os.kill(os.getpid(), signal.SIGKILL)),
)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "1").exists()
    package(exports("mlp"), tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["1"], "what the kill left is cleared"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"0.weight": np.zeros((16, 13), np.float32)}}, "mlp: parameters .* are not"),
        ({"calibration": np.zeros((4, 12), np.float32)}, r"calibration data is float32 of shape \(4, 12\)"),
        ({"calibration": np.zeros((0, 13), np.float32)}, r"calibration data is float32 of shape \(0, 13\)"),
        ({"calibration": np.zeros((4, 13), np.float64)}, "calibration data is float64"),
    ],
)
def test_arguments_that_do_not_fit_the_architecture_are_refused(exports, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        package(exports("mlp"), tmp_path / "1", **changes)
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_not_finite_are_never_packaged(exports, tmp_path):
    parameters = exports("mlp").build_parameters(0)
    parameters["0.bias"][3] = np.nan
    with pytest.raises(UsageError, match=r"parameter '0\.bias' is not finite"):
        package(exports("mlp"), tmp_path / "1", parameters=parameters)


def test_version_is_never_overwritten(exports, tmp_path):
    package(exports("mlp"), tmp_path / "1")
    with pytest.raises(UsageError, match="a version is immutable"):
        package(exports("mlp"), tmp_path / "1")


def test_step_without_a_graph_is_left_to_opacus_and_said_in_one_line(tmp_path, caplog):
    definition = ModelDefinition(
        name="pooled",
        build=lambda: nn.Sequential(
            nn.Linear(4, 2), nn.Unflatten(1, (1, 2)), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(1, 2)
        ),
        inputs=(TensorSpec("features", ("batch", 4), "float32"),),
        outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
        loss="cross_entropy",
        metric="accuracy",
        batch=4,
    )
    architecture = export_architecture(definition, tmp_path / "pooled")
    (record,) = [record.getMessage() for record in caplog.records if record.name.startswith("fl_server")]
    assert "\n" not in record
    assert record.startswith("pooled: train_step.onnx cannot be exported: ")
    assert record.endswith("each needs edge-fl[opacus], and this definition as federation.definition")
    manifest = package_version(
        architecture,
        parameters=architecture.load_initial_parameters(),
        version=1,
        calibration=np.zeros((4, 4), np.float32),
        tools=build_tools(),
        lineage=Lineage(),
        privacy=None,
        out_dir=tmp_path / "1",
    )
    assert set(manifest.files) == {"inference.onnx", "evaluate.onnx", "parameters.safetensors"}
    assert parse_manifest((tmp_path / "1" / "manifest.json").read_bytes()) == manifest
    assert (manifest.training.engine, manifest.step_digest) == ("opacus", manifest.files["evaluate.onnx"].digest)


def test_packaging_and_evaluation_need_no_torch():
    code = (
        "import sys, fl_server.packaging.package, fl_server.evaluation.evaluate, fl_server.packaging.definitions\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trained_digits_stay_accurate_in_int8(tmp_path):
    splits = load_splits(devices=4, seed=0)
    torch.manual_seed(0)
    module = definition.build()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    x = torch.tensor(np.concatenate([device.x for device in splits.devices]))
    y = torch.tensor(np.concatenate([device.y for device in splits.devices]))
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    architecture = export_architecture(definition, tmp_path / "digits")
    parameters = {name: value.detach().numpy() for name, value in module.named_parameters()}
    test = splits.test
    manifest = package_version(
        architecture,
        parameters=parameters,
        version=1,
        calibration=splits.validation.x,
        tools=Tools(measure=lambda inference, exact: measure_quality(inference, exact, test.x, test.y, "accuracy")),
        lineage=Lineage(),
        privacy=None,
        out_dir=tmp_path / "1",
    )
    assert manifest.quality is not None
    assert manifest.quality.float_value > Decimal("0.93")
    assert abs(manifest.quality.value - manifest.quality.float_value) <= Decimal("0.02")
    assert 0 < manifest.quality.logit_deviation < Decimal("0.5")
    assert manifest.files["inference.onnx"].size_bytes < manifest.files["parameters.safetensors"].size_bytes
    evaluation = Evaluator(architecture.evaluate_path, architecture.training, "accuracy").evaluate(
        parameters, test.x, test.y
    )
    assert evaluation.samples == 300
    assert evaluation.value == pytest.approx(float(manifest.quality.float_value), abs=1e-6)
    with torch.no_grad():
        loss = functional.cross_entropy(module(torch.tensor(test.x)), torch.tensor(test.y))
    assert evaluation.loss == pytest.approx(float(loss), rel=1e-4)
