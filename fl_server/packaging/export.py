"""A definition becomes graphs, once per architecture: float inference, training step, evaluation."""

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fl_server.errors import DefinitionError, ServerError, UsageError
from fl_server.packaging.architecture import (
    FLOAT_NAME,
    INITIAL_NAME,
    Architecture,
    ArchitectureDocument,
    load_architecture,
    save_architecture_document,
)
from fl_server.packaging.decompositions import DECOMPOSITIONS
from fl_server.packaging.graphs import (
    bind_inputs,
    build_with_parameters,
    compact_constants,
    load_graph,
    save_graph,
    strip_metadata,
)
from fl_server.packaging.losses import SampleLosses, build_sample_losses, build_target_spec
from fl_server.packaging.training_step import Step, build_evaluation, build_training_step, check_step, find_layers
from models.contract.files import sync_directory
from models.contract.manifest import EVALUATE_NAME, TRAIN_STEP_NAME, TrainingContract
from models.definitions import ModelDefinition, TensorSpec
from models.tensors.layout import Layout

OPSET = 18  # the oldest that holds all we emit: any onnxruntime a device may have reads it
_CLIPPING_NORM = 1.0  # an example for tracing; a graph takes it as input
_TOLERANCE = 1e-4  # between torch and onnxruntime, relative to the largest value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """A definition's module with what every export of it needs."""

    definition: ModelDefinition
    module: nn.Module
    losses: SampleLosses
    target: TensorSpec
    x: Tensor
    y: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.module.named_parameters()}


class _Functional(nn.Module):
    """The module with its parameters as arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._names = [name for name, _ in module.named_parameters()]

    def forward(self, x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = functional_call(self._module, dict(zip(self._names, values, strict=True)), (x,))
        return output


def export_architecture(definition: ModelDefinition, directory: Path, *, seed: int = 0) -> Architecture:
    """Export `definition` to `directory`, which appears whole or not at all; takes some seconds.

    Args:
        definition: Its module is initialised from `seed` and exported as for inference.
        directory: Must not exist; its parent must.
        seed: The same seed gives the same initial parameters.

    Raises:
        DefinitionError: The definition cannot be trained privately or exported; says what to change.
        UsageError: `directory` exists.
    """
    if directory.exists():
        raise UsageError(f"{directory} exists: remove it to export {definition.name} anew")
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with _quiet_exporter(), torch.random.fork_rng():
            torch.manual_seed(seed)
            source = _load_source(definition)
            _export_all(source, staging)
        staging.chmod(0o755)
        sync_directory(staging)
        staging.rename(directory)
    except DefinitionError as error:
        raise DefinitionError(f"{definition.name}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_directory(directory.parent)
    return load_architecture(directory)


def _load_source(definition: ModelDefinition) -> _Source:
    try:
        module = definition.build().eval()
    except Exception as error:
        raise DefinitionError(f"build() failed: {_say(error)}") from error
    target = build_target_spec(definition)
    return _Source(
        definition=definition,
        module=module,
        losses=build_sample_losses(definition),
        target=target,
        x=_example(definition.inputs[0], definition.batch, module),
        y=_example_target(definition, target),
    )


def _export_all(source: _Source, staging: Path) -> None:
    definition, parameters = source.definition, source.parameters
    step = build_training_step(source.module, source.losses)
    evaluation = build_evaluation(source.module, source.losses)
    _check_module(source, step)
    mask, clipping_norm = torch.ones(definition.batch), torch.tensor(_CLIPPING_NORM)
    names = list(parameters)
    _export_traced(
        step,
        dict(zip(["x", "y", "mask", "clipping_norm", *names],
                 [source.x, source.y, mask, clipping_norm, *parameters.values()], strict=True)),
        [*(f"sum/{name}" for name in names), "norms"],
        staging / TRAIN_STEP_NAME,
    )  # fmt: skip
    _export_traced(
        evaluation,
        dict(zip(["x", "y", "mask", *names], [source.x, source.y, mask, *parameters.values()], strict=True)),
        ["loss", "output"],
        staging / EVALUATE_NAME,
    )
    _export_float(source, staging / FLOAT_NAME)
    save_file({name: value.numpy() for name, value in parameters.items()}, staging / INITIAL_NAME)
    has_embedding = any(isinstance(layer, nn.Embedding) for layer in find_layers(source.module).values())
    document = ArchitectureDocument(
        model=definition.name,
        inputs=definition.inputs,
        outputs=definition.outputs,
        labels=definition.labels,
        training=TrainingContract(
            layout=Layout(names=tuple(names), shapes=tuple(tuple(value.shape) for value in parameters.values())),
            batch=definition.batch,
            target=source.target,
            metric=definition.metric if isinstance(definition.metric, str) else definition.metric.__name__,
        ),
        quantization="dynamic" if has_embedding else "static",
    )
    save_architecture_document(staging, document)


def _check_module(source: _Source, step: Step) -> None:
    """Run module, loss and step once, so that a mistake is named before the long export."""
    spec = source.definition.outputs[0]
    expected = (source.definition.batch, *spec.row_shape)
    try:
        output = source.module(source.x)
        if tuple(output.shape) != expected or output.dtype != getattr(torch, spec.dtype):
            raise DefinitionError(
                f"output {spec.name!r} is {output.dtype} of shape {tuple(output.shape)}, "
                f"the definition says {spec.dtype} of shape {expected}"
            )
        losses = source.losses(output, source.y)
        if callable(source.definition.loss):
            whole = source.definition.loss(output, source.y)
            if not torch.allclose(whole, losses.sum(), rtol=1e-3):
                raise DefinitionError("the loss is not the sum of the losses of the rows; reduce by sum, not by mean")
        check_step(source.module, step, source.losses, source.x, source.y)
    except ServerError:
        raise
    except Exception as error:  # the author's code, run on data of the shapes that the definition states
        raise DefinitionError(f"the module does not run on its own inputs: {_say(error)}") from error


def _export_traced(step: Step, feeds: dict[str, Tensor], output_names: list[str], path: Path) -> None:
    """Write `step`, traced on `feeds`, to `path`, and compare onnxruntime with torch on them."""
    values = tuple(feeds.values())
    try:
        traced = make_fx(step, decomposition_table=DECOMPOSITIONS)(*values)
        exported = torch.export.export(traced, values, strict=False)
        graph = _build_graph(exported, list(feeds), output_names)
    except ServerError:
        raise
    except Exception as error:  # the exporter raises whatever its many parts raise
        raise DefinitionError(f"{path.name} cannot be exported: {_say(error)}") from error
    compact_constants(graph)
    del graph.graph.value_info[:]  # shapes that a runtime infers
    save_graph(graph, path)
    _check_same(path, {name: value.numpy() for name, value in feeds.items()}, step(*values))


def _export_float(source: _Source, path: Path) -> None:
    definition, parameters = source.definition, source.parameters
    feeds = (source.x[:2], *parameters.values())
    dynamic = ({0: torch.export.Dim("batch")}, (None,) * len(parameters))
    try:
        exported = torch.export.export(_Functional(source.module), feeds, dynamic_shapes=dynamic, strict=False)
        graph = _build_graph(exported, [definition.inputs[0].name, *parameters], [definition.outputs[0].name])
    except Exception as error:  # as above
        raise DefinitionError(f"{path.name} cannot be exported for any batch: {_say(error)}") from error
    bind_inputs(graph, {name: value.numpy() for name, value in parameters.items()})
    save_graph(graph, path)
    _check_parameters_are_replaceable(source, path)


def _build_graph(exported: ExportedProgram, input_names: list[str], output_names: list[str]) -> onnx.ModelProto:
    program = torch.onnx.export(
        exported,
        input_names=input_names,
        output_names=output_names,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto
    strip_metadata(graph)
    return graph


def _check_parameters_are_replaceable(source: _Source, path: Path) -> None:
    """Put other parameters into the graph: a copy of the old ones that the exporter left somewhere would show."""
    others = {name: value + 0.1 * torch.randn_like(value) for name, value in source.parameters.items()}
    changed_path = path.with_suffix(".changed")
    try:
        arrays = {name: value.numpy() for name, value in others.items()}
        save_graph(build_with_parameters(load_graph(path), arrays), changed_path)
        with torch.no_grad():
            expected = functional_call(source.module, others, (source.x,))
        _check_same(changed_path, {source.definition.inputs[0].name: source.x.numpy()}, (expected,))
    finally:
        changed_path.unlink(missing_ok=True)


def _check_same(path: Path, feeds: dict[str, Any], expected: Sequence[Tensor]) -> None:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    known = {tensor.name for tensor in session.get_inputs()}
    found = session.run(None, {name: value for name, value in feeds.items() if name in known})
    if missing := set(feeds) - known:
        raise DefinitionError(f"{path.name}: input {min(missing)!r} has no effect and was dropped by the exporter")
    for value, wanted in zip(found, expected, strict=True):
        reference = wanted.detach().numpy()
        if not np.allclose(value, reference, rtol=0, atol=_TOLERANCE * max(1.0, float(np.abs(reference).max()))):
            raise DefinitionError(f"{path.name}: onnxruntime and torch differ by {np.abs(value - reference).max():.1e}")


def _example(spec: TensorSpec, batch: int, module: nn.Module) -> Tensor:
    shape = (batch, *spec.row_shape)
    if spec.dtype.startswith("float"):
        return torch.rand(shape, dtype=getattr(torch, spec.dtype))
    sizes = [layer.num_embeddings for layer in module.modules() if isinstance(layer, nn.Embedding)]
    return torch.randint(0, min(sizes, default=2), shape).to(getattr(torch, spec.dtype))


def _example_target(definition: ModelDefinition, target: TensorSpec) -> Tensor:
    shape = (definition.batch, *target.row_shape)
    if target.dtype == "int64":
        return torch.randint(0, definition.outputs[0].row_shape[0] if definition.outputs[0].row_shape else 2, shape)
    if definition.loss == "bce_with_logits":
        return torch.randint(0, 2, shape).to(torch.float32)
    return torch.randn(shape)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep what torch tells its own developers off the operator's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _say(error: Exception) -> str:
    """Return one line: the innermost cause, which is what the author can act on."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
