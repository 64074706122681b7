"""Model versions small enough to read: one dense layer, made with onnx alone."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.contract.encoding import build_digest
from models.contract.manifest import MANIFEST_NAME, FileEntry, ModelManifest, build_manifest
from models.tensors.spec import TensorSpec

FEATURES = 4
CLASSES = 3
INPUT = TensorSpec("features", ("batch", FEATURES), "float32")
OUTPUT = TensorSpec("logits", ("batch", CLASSES), "float32")
LABELS = ("low", "middle", "high")


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
    directory: Path, *, version: int = 1, graph: bytes | None = None, model: str = "tiny"
) -> ModelManifest:
    """Write a version that answers `version` times the sum of the features; return its manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    data = build_graph(version).SerializeToString() if graph is None else graph
    (directory / "inference.onnx").write_bytes(data)
    manifest = ModelManifest(
        model=model,
        version=version,
        runtime="onnx",
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        labels=LABELS,
        files={"inference.onnx": FileEntry(digest=build_digest(data), size_bytes=len(data))},
    )
    (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest
