"""The model of `step_graph.py` as definitions for the Opacus engine; honest, and another than is promised.

A linear model with the loss (w x + b - y)^2 / 2, or with y as an index into (-1.0, 1.0). Found by name, as an owner's
definition is: `tests.simulators.linear:features_3`.
"""

from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import nn

from edge_agent.training.opacus_engine import OpacusEngine
from edge_agent.training.step import Step
from models.contract.encoding import build_digest
from models.contract.manifest import EVALUATE_NAME, LOCAL_NAME, MANIFEST_NAME, FileEntry, ModelManifest, build_manifest
from models.definitions import ModelDefinition, TensorSpec
from models.tensors.layout import Layout
from tests.simulators.step_graph import LOCAL_BIAS, build_step_manifest


def halved_squares(output, target):
    return ((output.reshape(target.shape) - target) ** 2).sum() / 2


def halved_squares_of_classes(output, target):
    return halved_squares(output.reshape(target.shape), torch.tensor([-1.0, 1.0])[target])


def define(features: int, *, labels: tuple[str, ...] = (), build=nn.Linear, loss=None) -> ModelDefinition:
    return ModelDefinition(
        name="linear",
        build=lambda: build(features, 1),
        inputs=(TensorSpec("x", ("batch", features), "float32"),),
        outputs=(TensorSpec("output", ("batch", 1), "float32"),),
        loss=loss or (halved_squares_of_classes if labels else halved_squares),
        metric="rmse",
        labels=labels,
    )


features_3, features_200, features_9999 = define(3), define(200), define(9999)
labelled_3 = define(3, labels=("low", "high"))
doubled_3 = define(3, loss=lambda output, target: 2 * halved_squares(output, target))
without_bias_3 = define(3, build=lambda width, out: nn.Linear(width, out, bias=False))
number = 3


def build_evaluation_graph(*, features: int = 3, batch: int = 8, labels: bool = False) -> bytes:
    target = "Gather (classes, y)" if labels else "Identity (y)"
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    evaluate (float[{batch},{features}] x, {"int64" if labels else "float"}[{batch}] y, float[{batch}] mask,
              float[1,{features}] weight, float[1] bias) => (float loss, float[{batch},1] output) {{
        classes = Constant <value = float[2] {{-1.0, 1.0}}> ()
        half = Constant <value = float {{0.5}}> ()
        last = Constant <value = int64[1] {{1}}> ()
        target = {target}
        columns = Transpose (weight)
        product = MatMul (x, columns)
        output = Add (product, bias)
        flat = Squeeze (output, last)
        residual = Sub (flat, target)
        squares = Mul (residual, residual)
        halves = Mul (squares, half)
        real = Mul (halves, mask)
        loss = ReduceSum <keepdims = 0> (real)
    }}"""
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build_opacus_manifest(
    evaluation: bytes, *, features: int = 3, batch: int = 8, labels: bool = False, local: bool = False
) -> ModelManifest:
    manifest = build_step_manifest(b"no step", features=features, batch=batch, labels=labels, local=local)
    return replace(
        manifest,
        files={
            **{name: entry for name, entry in manifest.files.items() if name in {"inference.onnx", LOCAL_NAME}},
            EVALUATE_NAME: FileEntry(digest=build_digest(evaluation), size_bytes=len(evaluation)),
        },
        training=replace(
            manifest.training,
            engine="opacus",
            layout=Layout(names=("weight", "bias"), shapes=((1, features), (1,))),
        ),
    )


def open_opacus_step(**options) -> tuple[Step, ModelManifest]:
    """Return the open step of the definition here that fits `options`, and its manifest."""
    evaluation = build_evaluation_graph(**options)
    manifest = build_opacus_manifest(evaluation, **options)
    kind = "labelled" if options.get("labels") else "features"
    reference = f"{__name__}:{kind}_{options.get('features', 3)}"
    return Step(OpacusEngine(reference, manifest, evaluation), manifest), manifest


def save_opacus_version(directory: Path, *, local: bool = False) -> ModelManifest:
    """Write what a training process needs of a version that trains with the Opacus engine; return its manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    evaluation = build_evaluation_graph()
    manifest = build_opacus_manifest(evaluation, local=local)
    (directory / LOCAL_NAME).write_bytes(LOCAL_BIAS)
    (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    (directory / EVALUATE_NAME).write_bytes(evaluation)
    return manifest
