"""A version that gives back what it takes, one input and output for each dtype a model can have."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from models.contract.encoding import build_digest
from models.contract.manifest import MANIFEST_NAME, FileEntry, ModelManifest, build_manifest
from models.tensors.spec import DTYPES, TensorSpec

WIDTH = 2
NAME = "echo"
INPUTS = tuple(TensorSpec(f"{dtype}_in", ("batch", WIDTH), dtype) for dtype in DTYPES)
OUTPUTS = tuple(TensorSpec(f"{dtype}_out", ("batch", WIDTH), dtype) for dtype in DTYPES)


def save_echo_version(directory: Path) -> ModelManifest:
    """Write the version; return its manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        [helper.make_node("Identity", [spec.name], [out.name]) for spec, out in zip(INPUTS, OUTPUTS, strict=True)],
        NAME,
        [helper.make_tensor_value_info(spec.name, _find_type(spec), ["batch", WIDTH]) for spec in INPUTS],
        [helper.make_tensor_value_info(spec.name, _find_type(spec), ["batch", WIDTH]) for spec in OUTPUTS],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    (directory / "inference.onnx").write_bytes(data)
    manifest = ModelManifest(
        model=NAME,
        version=1,
        runtime="onnx",
        inputs=INPUTS,
        outputs=OUTPUTS,
        files={"inference.onnx": FileEntry(digest=build_digest(data), size_bytes=len(data))},
    )
    (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest


def _find_type(spec: TensorSpec) -> int:
    if spec.dtype == "string":
        return TensorProto.STRING
    return helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
