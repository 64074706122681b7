"""A definition becomes graphs, once per architecture: float inference, training step, evaluation."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
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
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    name_batch_axis,
    save_graph,
    strip_metadata,
)
from fl_server.packaging.source import Source, check_opacus_step, derive_step, load_source, say
from fl_server.packaging.staging import staged_directory
from fl_server.packaging.training_step import build_evaluation
from models.contract.manifest import EVALUATE_NAME, TRAIN_STEP_NAME, TrainingContract
from models.definitions import ModelDefinition
from models.definitions.substitutes import Step
from models.tensors.layout import Layout

_LOG = logging.getLogger(__name__)

OPSET = 18  # the oldest that holds all we emit: any onnxruntime a device may have reads it
_CLIPPING_NORM = 1.0  # an example for tracing; a graph takes it as input
_TOLERANCE = 1e-4  # between torch and onnxruntime, relative to the largest value


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
    try:
        with staged_directory(directory) as staging, _quiet_exporter(), torch.random.fork_rng():
            torch.manual_seed(seed)
            _export_all(load_source(definition), staging)
    except DefinitionError as error:
        raise DefinitionError(f"{definition.name}: {error}") from error
    return load_architecture(directory)


def _export_all(source: Source, staging: Path) -> None:
    definition, parameters = source.definition, source.parameters
    local = _find_local(source)
    problem = _export_step(source, staging / TRAIN_STEP_NAME)
    evaluation = build_evaluation(source.module, source.losses)
    mask, names = torch.ones(definition.batch), list(parameters)
    _export_traced(
        evaluation,
        {"x": source.x, "y": source.y, "mask": mask, **parameters},
        ["loss", "output"],
        staging / EVALUATE_NAME,
    )
    _export_float(source, staging / FLOAT_NAME)
    save_file({name: value.numpy() for name, value in source.initial_parameters.items()}, staging / INITIAL_NAME)
    has_tables = any(isinstance(layer, nn.Embedding | nn.RNNBase) for layer in source.module.modules())
    document = ArchitectureDocument(
        model=definition.name,
        inputs=definition.inputs,
        outputs=definition.outputs,
        labels=definition.labels,
        features=definition.features,
        training=TrainingContract(
            layout=Layout(names=tuple(names), shapes=tuple(tuple(value.shape) for value in parameters.values())),
            batch=definition.batch,
            target=source.target,
            metric=definition.metric if isinstance(definition.metric, str) else definition.metric.__name__,
            engine="onnx" if problem is None else "opacus",
            local=local,
        ),
        quantization="dynamic" if has_tables else "static",
        prefer=definition.prefer,
        logit_tolerance=definition.logit_tolerance,
    )
    save_architecture_document(staging, document)
    if problem is not None:
        _LOG.warning(
            "%s: %s; so devices train it with the Opacus engine: each needs edge-fl[opacus], and this definition as "
            "federation.definition",
            definition.name,
            problem,
        )


def _find_local(source: Source) -> tuple[str, ...]:
    try:
        return source.definition.find_local(tuple(source.parameters))
    except ValueError as error:
        raise DefinitionError(str(error)) from error


def _export_step(source: Source, path: Path) -> DefinitionError | None:
    """Write the training step to `path`, or return why it has no graph; the Opacus engine then takes it.

    Raises:
        DefinitionError: The module cannot be trained privately by either.
    """
    try:
        _export_derived(source, path)
    except DefinitionError as error:
        path.unlink(missing_ok=True)
        try:
            check_opacus_step(source)
        except DefinitionError:
            raise error from None  # which says what to change
        return error
    return None


def _export_derived(source: Source, path: Path) -> None:
    step, reason = derive_step(source)
    mask, clipping_norm = torch.ones(source.definition.batch), torch.tensor(_CLIPPING_NORM)
    feeds = {"x": source.x, "y": source.y, "mask": mask, "clipping_norm": clipping_norm, **source.parameters}
    try:
        _export_traced(step, feeds, [*(f"sum/{name}" for name in source.parameters), "norms"], path)
    except DefinitionError as error:
        raise (
            DefinitionError(f"{error}; one gradient a sample was tried because {reason}") if reason else error
        ) from error


def _export_traced(step: Step, feeds: dict[str, Tensor], output_names: list[str], path: Path) -> None:
    """Write `step`, traced on `feeds`, to `path`, and compare onnxruntime with torch on them."""
    values = tuple(feeds.values())
    try:
        # Without the fused kernels of attention and LSTM, which have no translation.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            traced = make_fx(step, decomposition_table=DECOMPOSITIONS)(*values)
        exported = torch.export.export(traced, values, strict=False)
        graph = _build_graph(exported, list(feeds), output_names)
    except ServerError:
        raise
    except Exception as error:  # the exporter raises whatever its many parts raise
        raise DefinitionError(f"{path.name} cannot be exported: {say(error)}") from error
    compact_constants(graph)
    del graph.graph.value_info[:]  # shapes that a runtime infers
    save_graph(graph, path)
    _check_same(path, {name: value.numpy() for name, value in feeds.items()}, step(*values))


def _export_float(source: Source, path: Path) -> None:
    definition, parameters = source.definition, source.parameters
    feeds = (source.x[:2], *parameters.values())
    dynamic = ({0: torch.export.Dim("batch")}, (None,) * len(parameters))
    try:
        exported = torch.export.export(_Functional(source.module), feeds, dynamic_shapes=dynamic, strict=False)
        graph = _build_graph(exported, [definition.inputs[0].name, *parameters], [definition.outputs[0].name])
    except Exception as error:  # as above
        raise DefinitionError(f"{path.name} cannot be exported for any batch: {say(error)}") from error
    name_batch_axis(graph)
    bind_inputs(graph, {name: value.numpy() for name, value in source.initial_parameters.items()})
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


def _check_parameters_are_replaceable(source: Source, path: Path) -> None:
    """Put other parameters into the graph: a copy of the old ones that the exporter left somewhere would show."""
    changed_path = path.with_suffix(".changed")
    try:
        arrays = {name: value.numpy() for name, value in source.parameters.items()}
        save_graph(build_with_parameters(load_graph(path), arrays), changed_path)
        with torch.no_grad():
            expected = functional_call(source.module, source.parameters, (source.x,))
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
