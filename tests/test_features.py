"""One row, the same input everywhere: packaging and evaluation, batch inference, and what a device trains on."""

import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import edge_agent.__main__
import fl_server.__main__
from edge_agent.collector import Collector
from edge_agent.config import AgentSettings
from models.contract.manifest import parse_manifest
from models.tensors.features import build_inputs
from tests.simulators.samples import open_device_samples

HEART = """
from torch import nn
from models.definitions import Feature, ModelDefinition, TensorSpec

definition = ModelDefinition(
    name="heart",
    build=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)),
    features=(
        Feature("age", impute=54, clip=(0, 120), scale=(54.4, 9.1)),
        Feature("pain", one_hot=("none", "typical", "other")),
        Feature("ward", impute="", hash=2),
    ),
    inputs=(TensorSpec("features", ("batch", 6), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
    labels=("healthy", "disease"),
)
"""
COLUMNS = ("age", "pain", "ward", "ill")


def test_columns_mean_the_same_in_packaging_inference_and_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(3)
    ages, wards = (
        generator.integers(20, 90, 64).astype(float),
        [f"ward {number}" for number in generator.integers(9, size=64)],
    )
    pains, ill = generator.choice(["none", "typical", "odd"], 64).tolist(), generator.integers(2, size=64)
    Path("heart.py").write_text(HEART)
    np.savez("raw.npz", age=ages, pain=np.array(pains), ward=np.array(wards), y=ill)
    with Path("raw.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *zip(ages.tolist(), pains, wards, ill.tolist(), strict=True)])
    package = ["package", "heart.py:definition", "--validation", "raw.npz", "--out", "v1"]
    assert fl_server.__main__.main(package) == 0
    manifest = parse_manifest(Path("v1/manifest.json").read_bytes())
    assert [feature.column for feature in manifest.features] == ["age", "pain", "ward"]
    assert manifest.quality is not None
    assert manifest.quality.samples == 64

    infer = ["infer", "--input", "raw.csv", "--output", "out.jsonl", "--version-dir", "v1"]
    assert edge_agent.__main__.main(infer) == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    rows = [dict(zip(COLUMNS, row, strict=False)) for row in zip(ages.tolist(), pains, wards, strict=True)]
    x = build_inputs(manifest.features, manifest.inputs, rows)["features"]
    (logits,) = ort.InferenceSession("v1/inference.onnx", providers=["CPUExecutionProvider"]).run(None, {"features": x})
    np.testing.assert_array_equal(np.array([row["logits"] for row in answers], np.float32), logits)
    right = np.mean([manifest.labels.index(row["label"]) == truth for row, truth in zip(answers, ill, strict=True)])
    assert float(manifest.quality.value) == pytest.approx(right, abs=1e-6)

    settings = AgentSettings(
        device_id="d", fleet="f", model="heart", state_dir=tmp_path, tuf_root_path=tmp_path / "root.json"
    )
    collector = Collector(settings, get_manifest=lambda: manifest)
    collector.add([(row, np.array(truth)) for row, truth in zip(rows, ill, strict=True)])
    collector.keeper.close()
    assert manifest.training is not None
    with open_device_samples(tmp_path, "heart") as store:
        trained_on, targets = store.load(manifest.training_input, manifest.training.target)
    assert trained_on.tobytes() == x.tobytes()
    np.testing.assert_array_equal(targets, ill)
