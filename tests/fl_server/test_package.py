"""`fl-server package` as it is typed, for models made elsewhere; the example of the README is the one that runs here."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from skl2onnx import to_onnx
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression

from fl_server.__main__ import main
from fl_server.held_out import load_named_data
from models.contract.manifest import parse_manifest
from models.tensors.spec import TensorSpec

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load_manifest(directory):
    return parse_manifest((directory / "manifest.json").read_bytes())


def save_iris(model, path, **options):
    x, y = load_iris(return_X_y=True)
    x = x.astype(np.float32)
    path.write_bytes(to_onnx(model.fit(x, y), x[:1], **options).SerializeToString())
    return x, y


def test_example_of_the_readme_becomes_a_version_that_answers_as_scikit_learn_does(tmp_path, capsys):
    text = (ROOT / "fl_server/README.md").read_text()
    section = text.split("## A model made elsewhere")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    command = next(line for line in commands.splitlines() if "iris.onnx" in line)
    assert main(command.split("#")[0].split()[1:]) == 0

    manifest = load_manifest(tmp_path / "iris-1")
    assert [(spec.name, spec.shape, spec.dtype) for spec in (*manifest.inputs, *manifest.outputs)] == [
        ("X", ("batch", 4), "float32"),
        ("label", ("batch",), "string"),
        ("probabilities", ("batch", 3), "float32"),
    ]
    assert manifest.labels == ("setosa", "versicolor", "virginica")
    assert manifest.quality.metric == "accuracy"
    assert manifest.quality.value > 0.9
    assert f"accuracy {manifest.quality.value:.3f} on {manifest.quality.samples} samples" in capsys.readouterr().out
    with np.load(tmp_path / "validation.npz") as arrays:
        session = ort.InferenceSession(tmp_path / "iris-1/inference.onnx", providers=["CPUExecutionProvider"])
        label, probabilities = session.run(None, {"X": arrays["x"]})
        assert np.mean(label == arrays["y"]) == pytest.approx(float(manifest.quality.value), abs=1e-6)
        assert (np.array(manifest.labels)[probabilities.argmax(1)] == label).all()


def test_integer_labels_and_regressions_are_served_too(tmp_path):
    x, y = save_iris(RandomForestClassifier(5, random_state=0), tmp_path / "m.onnx", options={"zipmap": False})
    np.savez(tmp_path / "v.npz", x=x, y=y)
    assert main(["package", "m.onnx", "--name", "forest", "--out", "f", "--validation", "v.npz"]) == 0
    assert load_manifest(tmp_path / "f").outputs[0] == TensorSpec("label", ("batch",), "int64")

    save_iris(LinearRegression(), tmp_path / "r.onnx")
    np.savez(tmp_path / "r.npz", X=x, y=y.astype(np.float64))
    assert main(["package", "r.onnx", "--name", "line", "--out", "l", "--validation", "r.npz"]) == 0
    manifest = load_manifest(tmp_path / "l")
    assert manifest.outputs == (TensorSpec("variable", ("batch", 1), "float32"),)
    assert (manifest.quality.metric, manifest.quality.value < 0.3) == ("rmse", True)


def test_maps_are_refused_with_the_option_that_turns_them_into_tensors(tmp_path, capsys):
    save_iris(RandomForestClassifier(2), tmp_path / "m.onnx")
    assert main(["package", "m.onnx", "--name", "forest", "--out", "v"]) == 1
    error = capsys.readouterr().err
    assert "seq(map(int64,tensor(float)))" in error
    assert "options={'zipmap': False}" in error
    assert not (tmp_path / "v").exists()


def test_finished_tflite_graph_is_packaged_by_one_command(tmp_path):
    source = DATA / "tflite-version/inference.tflite"
    assert main(["package", str(source), "--name", "strokes", "--labels", "0,1,2,3,4,5,6,7,8,9", "--out", "v"]) == 0
    manifest = load_manifest(tmp_path / "v")
    assert (manifest.runtime, manifest.labels) == ("tflite", tuple("0123456789"))
    assert (tmp_path / "v/inference.tflite").read_bytes() == source.read_bytes()


def test_federation_numbers_the_versions_of_a_finished_graph(tmp_path):
    source = str(DATA / "tflite-version/inference.tflite")
    assert main(["init", "fed"]) == 0
    for name in ("a", "b"):
        arguments = ["package", source, "--name", "strokes", "--out", name, "--config", "fed/fl-server.toml"]
        assert main(arguments) == 0
        assert load_manifest(tmp_path / name).version == 1, "what is not released takes no number"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.onnx", "--name", "m"], "missing.onnx: no such file"),
        (["GRAPH"], "say with --name what it is served as"),
        (["GRAPH", "--name", "a/b"], "a/b"),
        (["GRAPH", "--name", "m", "--parameters", "p"], "--parameters cannot be used here: "),
        (["GRAPH", "--name", "m", "--runtime", "tflite"], "--runtime cannot be used here: "),
        (["GRAPH", "--name", "m", "--labels", "a,b"], "2 labels, but no output has a last axis of that length"),
        (["GRAPH", "--name", "m", "--validation", "v.npz"], "v.npz: no output has as many numbers|y has shape"),
        (["models.definitions.digits:definition", "--name", "m"], "--name cannot be used here: a definition says"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    np.savez(tmp_path / "v.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2))
    graph = str(DATA / "tflite-version/inference.tflite")
    assert main(["package", *(graph if part == "GRAPH" else part for part in arguments), "--out", "v"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1])
    assert not (tmp_path / "v").exists()


def test_data_of_several_inputs_is_an_array_for_each(tmp_path):
    specs = (TensorSpec("age", ("batch", 1), "float32"), TensorSpec("city", ("batch", 1), "string"))
    np.savez(tmp_path / "d.npz", age=np.ones((2, 1)), city=np.array([["Ulm"], ["Bern"]]))
    data = load_named_data(tmp_path / "d.npz", specs)
    assert (data.inputs["age"].dtype, data.inputs["city"].tolist(), data.y) == (np.float32, [["Ulm"], ["Bern"]], None)
    assert data.inputs["city"].dtype == object
