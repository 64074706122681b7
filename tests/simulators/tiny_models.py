"""Model versions small enough to read: one dense layer, made with onnx alone."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.contract.encoding import build_digest
from models.contract.golden import Golden, build_golden
from models.contract.manifest import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    FileEntry,
    ModelManifest,
    TrainingContract,
    build_manifest,
)
from models.tensors.features import Feature
from models.tensors.layout import Layout
from models.tensors.spec import TensorSpec

FEATURES = 4
CLASSES = 3
INPUT = TensorSpec("features", ("batch", FEATURES), "float32")
OUTPUT = TensorSpec("logits", ("batch", CLASSES), "float32")
LABELS = ("low", "middle", "high")
_TRAINING = TrainingContract(
    layout=Layout(names=("weight",), shapes=((FEATURES, CLASSES),)),
    batch=8,
    target=TensorSpec("label", ("batch",), "int64"),
    metric="accuracy",
)


def build_graph(scale: float, *, output: str = OUTPUT.name, columns: int = CLASSES) -> onnx.ModelProto:
    """Return a graph whose every output is `scale` times the sum of the features."""
    weight = numpy_helper.from_array(np.full((FEATURES, columns), scale, np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", [INPUT.name, "weight"], [output])],
        "tiny",
        [helper.make_tensor_value_info(INPUT.name, TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", columns])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def save_version(
    directory: Path,
    *,
    version: int = 1,
    graph: bytes | None = None,
    weights: bytes = b"",
    trainable: bool = False,
    features: tuple[Feature, ...] = (),
    golden: Golden | None = None,
) -> ModelManifest:
    """Write a version that answers `version` times the sum of the features; return its manifest.

    Args:
        directory: Where to; made if it is not there.
        version: Its number.
        graph: Another inference graph.
        weights: Its external data, if it has any.
        trainable: Whether it claims to hold step graphs; they hold nothing that can be run.
        features: How raw columns become the four features.
        golden: What a device must find the graph to answer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = build_graph(version).SerializeToString() if graph is None else graph
    files = {"inference.onnx": data}
    if weights:
        files |= {"weights.bin": weights}
    if trainable:
        files |= {"train_step.onnx": b"no graph", "evaluate.onnx": b"no graph either"}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    described = None
    if golden is not None:
        content = build_golden(golden)
        (directory / GOLDEN_NAME).write_bytes(content)
        described = FileEntry(digest=build_digest(content), size_bytes=len(content))
    manifest = ModelManifest(
        model="tiny",
        version=version,
        runtime="onnx",
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        labels=LABELS,
        features=features,
        files={
            name: FileEntry(digest=build_digest(content), size_bytes=len(content)) for name, content in files.items()
        },
        golden=described,
        training=_TRAINING if trainable else None,
    )
    (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest
