"""A train step graph written by hand, of a linear model with the loss (w x + b - y)^2 / 2; honest, and at fault."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import onnx

from edge_agent.training.onnx_engine import OnnxEngine
from edge_agent.training.step import Step
from models.contract.encoding import build_digest
from models.contract.manifest import (
    EVALUATE_NAME,
    LOCAL_NAME,
    MANIFEST_NAME,
    TRAIN_STEP_NAME,
    FileEntry,
    ModelManifest,
    TrainingContract,
    build_manifest,
)
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Layout
from models.tensors.spec import TensorSpec

HONEST = "bounded = Min (ratio, one)  factor = Mul (bounded, mask)"
FAULTS = {
    "ignores the clip": "factor = Identity (mask)",
    "clips at five times the norm": "loose = Mul (ratio, five)  bounded = Min (loose, one)  factor = Mul (bounded, mask)",
    "clips a tenth too late": "loose = Mul (ratio, late)  bounded = Min (loose, one)  factor = Mul (bounded, mask)",
    "ignores the mask": "factor = Min (ratio, one)",
    "clips by the mean norm of the batch": (
        "mean = ReduceMean <keepdims = 1> (norms)  common = Div (clipping_norm, mean)"
        "  bounded = Min (common, one)  factor = Mul (bounded, mask)"
    ),
    "scales up by the largest norm of the batch": (
        "largest = ReduceMax <keepdims = 1> (norms)  common = Div (norms, largest)  direction = Mul (ratio, common)"
        "  more = Mul (direction, five)  bounded = Min (more, one)  factor = Mul (bounded, mask)"
    ),
}


def build_step_graph(*, features: int = 3, batch: int = 8, factor: str = HONEST, labels: bool = False) -> bytes:
    """Return the graph; with `labels`, y is an index into (-1.0, 1.0), and fails beyond it."""
    target = "float[B] target = Gather (classes, y)" if labels else "target = Identity (y)"
    body = f"""
        {target.removeprefix("float[B] ")}
        one = Constant <value = float {{1.0}}> ()
        late = Constant <value = float {{1.1}}> ()
        five = Constant <value = float {{5.0}}> ()
        last = Constant <value = int64[1] {{1}}> ()
        classes = Constant <value = float[2] {{-1.0, 1.0}}> ()
        product = MatMul (x, weight)
        output = Add (product, bias)
        residual = Sub (output, target)
        squares = Mul (x, x)
        length = ReduceSum <keepdims = 0> (squares, last)
        with_bias = Add (length, one)
        root = Sqrt (with_bias)
        size = Abs (residual)
        norms = Mul (root, size)
        ratio = Div (clipping_norm, norms)
        {factor}
        scaled = Mul (residual, factor)
        weight_sum = MatMul (scaled, x)
        bias_sum = ReduceSum <keepdims = 1> (scaled)
    """
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    step (float[{batch},{features}] x, {"int64" if labels else "float"}[{batch}] y, float[{batch}] mask,
          float clipping_norm, float[{features}] weight, float[1] bias)
        => (float[{features}] weight_sum, float[1] bias_sum, float[{batch}] norms) {{{body.replace("B]", f"{batch}]")}}}
    """
    # The constants come first: a graph is written in the order in which it runs.
    model = onnx.parser.parse_model(text)
    nodes = sorted(model.graph.node, key=lambda node: node.op_type != "Constant")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


LOCAL_BIAS = np.array([0.25], "<f4").tobytes()  # what the local bias of a version begins with


def build_step_manifest(
    step: bytes, *, features: int = 3, batch: int = 8, labels: bool = False, local: bool = False
) -> ModelManifest:
    """Return the manifest of a version with the graph `step`, of which the bias may be local."""
    other = FileEntry(digest=build_digest(b"other"), size_bytes=5)
    initial = FileEntry(digest=build_digest(LOCAL_BIAS), size_bytes=len(LOCAL_BIAS))
    return ModelManifest(
        model="linear",
        version=1,
        runtime="onnx",
        inputs=(TensorSpec("x", ("batch", features), "float32"),),
        outputs=(TensorSpec("output", ("batch",), "float32"),),
        files={
            "inference.onnx": other,
            TRAIN_STEP_NAME: FileEntry(digest=build_digest(step), size_bytes=len(step)),
            EVALUATE_NAME: other,
            **({LOCAL_NAME: initial} if local else {}),
        },
        training=TrainingContract(
            layout=Layout(names=("weight", "bias"), shapes=((features,), (1,))),
            batch=batch,
            target=TensorSpec("y", ("batch",), "int64" if labels else "float32"),
            metric="rmse",
            local=("bias",) if local else (),
        ),
    )


def open_onnx_step(**options) -> tuple[Step, ModelManifest]:
    """Return the open step of the graph that `build_step_graph` makes of `options`, and its manifest."""
    graph = build_step_graph(**{name: value for name, value in options.items() if name != "local"})
    options.pop("factor", None)
    manifest = build_step_manifest(graph, **options)
    return Step(OnnxEngine(graph, manifest.training.layout), manifest), manifest


def save_step_version(directory: Path, step: bytes, *, local: bool = False) -> ModelManifest:
    """Write what a training process needs of a version, and return its manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = build_step_manifest(step, local=local)
    (directory / LOCAL_NAME).write_bytes(LOCAL_BIAS)
    (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    (directory / TRAIN_STEP_NAME).write_bytes(step)
    return manifest


def clipped_sum_in_numpy(x, y, clipping_norm, parameters):
    """Return what the honest graph should, in float64."""
    x, y, parameters = (np.asarray(values, np.float64) for values in (x, y, parameters))
    residual = x @ parameters[:-1] + parameters[-1] - y
    gradients = np.column_stack([residual[:, None] * x, residual])
    norms = np.linalg.norm(gradients, axis=1)
    return (gradients * np.minimum(1, clipping_norm / np.maximum(norms, 1e-300))[:, None]).sum(0)


def build_privacy(**changed) -> PrivacyPlan:
    values = {
        "unit": Unit.SAMPLE,
        "clipping_norm": "1",
        "noise_multiplier": "1",
        "sampling_rate": "0.1",
        "delta": "0.001",
        "epsilon": "8",
        **changed,
    }
    return PrivacyPlan(**{name: value if name == "unit" else Decimal(value) for name, value in values.items()})


def build_training(*, rounds: int = 3, steps: int = 2, **changed) -> TrainingPlan:
    values = {"expected_batch": "10", "learning_rate": "0.1", "momentum": "0", "optimizer": "sgd", **changed}
    return TrainingPlan(
        rounds=rounds,
        steps=steps,
        **{name: value if name in {"optimizer", "uplink"} else Decimal(value) for name, value in values.items()},
    )
