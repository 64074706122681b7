"""What of a version folder is loaded or refused, and what a loaded version answers or refuses."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_agent.errors import RequestError, StalledError
from edge_agent.inference.model import load_model, load_version
from models.tensors.spec import TensorSpec
from tests.simulators.hostile_models import build_external
from tests.simulators.tiny_models import FEATURES, INPUT, OUTPUT, build_graph, save_version

ROW = np.ones((1, FEATURES), np.float32)


def test_loaded_version_answers_row_by_row(tmp_path: Path) -> None:
    model = load_model(tmp_path, save_version(tmp_path, version=3))
    outputs = model.infer({"features": np.stack([ROW[0], 2 * ROW[0]])})
    np.testing.assert_array_equal(outputs["logits"], [[12, 12, 12], [24, 24, 24]])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "expected inputs 'features', got none"),
        ({"x": ROW}, "expected inputs 'features', got 'x'"),
        ({"features": ROW, "more": ROW}, "got 'features', 'more'"),
        ({"features": ROW.astype(np.float64)}, "expected float32, got float64"),
        ({"features": ROW[0]}, r"expected shape \(rows, 4\)"),
        ({"features": ROW[:, :3]}, r"got \(1, 3\)"),
        ({"features": ROW[:0]}, "rows >= 1"),
        ({"features": np.float32(1).reshape(())}, r"got \(\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path, inputs: dict, said: str) -> None:
    model = load_model(tmp_path, save_version(tmp_path))
    with pytest.raises(RequestError, match=said):
        model.infer(inputs)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (b"not a graph", "refuses the graph"),
        (build_graph(1).SerializeToString()[:60], "refuses the graph"),
        (build_graph(1, output="scores").SerializeToString(), "outputs are"),
        (build_graph(1, columns=5).SerializeToString(), "has shape"),
        (build_graph(float("inf")).SerializeToString(), "not finite"),
    ],
)
def test_version_that_is_not_what_its_manifest_says_is_refused(tmp_path: Path, graph: bytes, said: str) -> None:
    manifest = save_version(tmp_path, graph=graph)
    with pytest.raises(StalledError, match=said):
        load_model(tmp_path, manifest)


def test_manifest_of_another_input_or_runtime_is_refused(tmp_path: Path) -> None:
    manifest = save_version(tmp_path)
    with pytest.raises(StalledError, match="inputs are"):
        load_model(tmp_path, replace(manifest, inputs=(TensorSpec("x", INPUT.shape, INPUT.dtype),)))
    with pytest.raises(StalledError, match="zeros of 1 rows"):
        load_model(tmp_path, replace(manifest, inputs=(TensorSpec(INPUT.name, ("batch", 9), INPUT.dtype),)))
    with pytest.raises(StalledError, match="float64"):
        load_model(tmp_path, replace(manifest, outputs=(TensorSpec(OUTPUT.name, OUTPUT.shape, "float64"),)))
    tflite = replace(manifest, runtime="tflite", files={"inference.tflite": manifest.files["inference.onnx"]})
    with pytest.raises(StalledError, match=r"inference\.tflite: No such file"):
        load_model(tmp_path, tflite)


def test_missing_file_is_named(tmp_path: Path) -> None:
    manifest = save_version(tmp_path)
    (tmp_path / "inference.onnx").unlink()
    with pytest.raises(StalledError, match=r"inference\.onnx"):
        load_model(tmp_path, manifest)


@pytest.mark.parametrize("kind", ["file", "hard link"])
def test_external_data_is_refused_even_as_a_hard_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "inference.onnx"
    onnx.save(build_graph(1), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    if kind == "hard link":
        (tmp_path / "w.bin").rename(tmp_path / "secret")
        os.link(tmp_path / "secret", tmp_path / "w.bin")
    manifest = save_version(tmp_path, graph=path.read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StalledError, match="External data"):
        load_model(tmp_path, manifest)


WEIGHTS = np.arange(FEATURES * 3, dtype=np.float32).tobytes()
LENGTH = len(WEIGHTS)


def test_graph_answers_with_the_weights_that_lie_beside_it(tmp_path: Path) -> None:
    save_version(tmp_path, graph=build_external("weights.bin", offset=0, length=LENGTH), weights=WEIGHTS)
    model = load_version(tmp_path)
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_array_equal(model.infer({"features": ROW})["logits"], [[18, 22, 26]])


@pytest.mark.parametrize(
    ("places", "weights"),
    [
        ({"offset": 0, "length": LENGTH}, WEIGHTS[:-4]),
        ({"offset": 4, "length": LENGTH}, WEIGHTS),
        ({"offset": LENGTH}, WEIGHTS),
        ({"offset": -8, "length": LENGTH}, bytes(8) + WEIGHTS),
        ({"offset": 1 << 62, "length": LENGTH}, WEIGHTS),
        ({"offset": (1 << 63) - 1, "length": LENGTH}, WEIGHTS),
        ({"offset": 0, "length": LENGTH + 16}, WEIGHTS + bytes(16)),
        ({"offset": 0, "length": LENGTH - 16}, WEIGHTS),
    ],
)
def test_weight_that_does_not_lie_inside_the_weights_is_refused(tmp_path: Path, places: dict, weights: bytes) -> None:
    """onnxruntime holds a graph's claims against the length that it is told: the true one."""
    manifest = save_version(tmp_path, graph=build_external("weights.bin", **places), weights=weights)
    with pytest.raises(StalledError, match="refuses the graph"):
        load_model(tmp_path, manifest)


@pytest.mark.parametrize("location", ["other.bin", "../weights.bin", "/etc/hostname", "folder/weights.bin"])
def test_external_data_by_any_other_name_is_refused_beside_the_weights(tmp_path: Path, location: str) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "weights.bin").write_bytes(WEIGHTS)
    manifest = save_version(tmp_path / "v", graph=build_external(location), weights=WEIGHTS)
    (tmp_path / "v" / "other.bin").write_bytes(WEIGHTS)
    with pytest.raises(StalledError, match="refuses the graph"):
        load_model(tmp_path / "v", manifest)


def test_weights_that_are_missing_or_not_the_manifests_are_refused(tmp_path: Path) -> None:
    save_version(tmp_path, graph=build_external("weights.bin"), weights=WEIGHTS)
    (tmp_path / "weights.bin").write_bytes(WEIGHTS[::-1])
    with pytest.raises(StalledError, match=r"weights\.bin: not the file that manifest\.json names"):
        load_version(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(StalledError, match=r"weights\.bin: No such file"):
        load_version(tmp_path)
