"""A graph made elsewhere as a version that is only served: scikit-learn's through skl2onnx, a vendor's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from fl_server.errors import DefinitionError, ServerError, UsageError
from fl_server.inference import Graph, OnnxGraph, TfliteGraph, open_graph, run_batches
from fl_server.packaging.golden import write_golden
from fl_server.packaging.graphs import load_graph
from fl_server.packaging.operators import check_operators, is_quantized
from fl_server.packaging.precision import BATCH, choose_precision, compute_deviation, measure_figures
from fl_server.packaging.quantize import quantize
from fl_server.packaging.staging import describe_file, staged_directory
from models.contract.manifest import (
    FILE_MAX_BYTES,
    INFERENCE_NAMES,
    MANIFEST_NAME,
    Measured,
    ModelManifest,
    Quality,
    Runtime,
    build_manifest,
)
from models.definitions.definition import DEFAULT_LOGIT_TOLERANCE
from models.tensors.spec import DTYPES, TensorSpec

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Run: TypeAlias = Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]
Say: TypeAlias = Callable[[str], None]

_RUNTIMES: Mapping[str, Runtime] = {".onnx": "onnx", ".tflite": "tflite"}
_ONNX_DTYPES = {"float": "float32", "double": "float64"}  # the others are named as NumPy names them
_PROBED_ROWS = (1, 2, 5)  # that outputs must follow, for their first axis to be the batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedGraph:
    """A graph file that runs, and the tensors at its doors."""

    path: Path
    runtime: Runtime
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graph: Graph

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name for inputs by name, any number of rows."""
        return run_batches(self.graph, inputs)


def is_graph_file(name: str) -> bool:
    """Return whether `name` is that of a graph rather than of a definition."""
    return Path(name).suffix in _RUNTIMES


def load_imported(path: Path) -> ImportedGraph:
    """Return the graph at `path`, after running it on zeros and on made-up rows.

    Raises:
        UsageError: There is no such file, or its runtime is not installed.
        DefinitionError: A device could not serve it; says what to change.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not 0 < path.stat().st_size <= FILE_MAX_BYTES:
        raise DefinitionError(f"{path}: {path.stat().st_size} bytes, a graph has 1 to {FILE_MAX_BYTES}")
    runtime = _RUNTIMES[path.suffix]
    try:
        if runtime == "onnx":
            check_operators(_parse(path))
        graph = open_graph(path)
        inputs = _read_tflite(graph) if isinstance(graph, TfliteGraph) else _read_onnx(graph)
        outputs = _probe(graph, inputs)
    except UsageError:
        raise
    except (ValueError, ServerError) as error:
        raise DefinitionError(f"{path}: {' '.join(str(error).split()):.300}") from error
    return ImportedGraph(path=path, runtime=runtime, inputs=inputs, outputs=outputs, graph=graph)


def package_imported(
    imported: ImportedGraph,
    *,
    model: str,
    version: int,
    labels: tuple[str, ...],
    calibration: Arrays | None,
    measure: Callable[[Run], Quality | None],
    out_dir: Path,
    say: Say,
) -> ModelManifest:
    """Write a version that is only served to `out_dir`, which appears whole and durable or not at all.

    Args:
        imported: The graph.
        model: The name it is served under.
        version: Counts up from 1 within the model.
        labels: Names of the classes, in the order of an output's last axis; may be empty.
        calibration: Inputs by name, on which a float ONNX graph is quantized, if that makes it smaller and its
            outputs stay close; None keeps the graph as it is.
        measure: Given a function that runs the packaged graph, says what the version is worth, if that is known.
        out_dir: Must not exist; its parent must.
        say: Is told what was decided.

    Raises:
        UsageError: `out_dir` exists, or no output has an axis for the labels.
    """
    if out_dir.exists():
        raise UsageError(f"{out_dir} exists: a version is immutable")
    if labels and all(spec.row_shape[-1:] != (len(labels),) for spec in imported.outputs):
        shapes = ", ".join(f"{spec.name} {spec.shape}" for spec in imported.outputs)
        raise UsageError(f"{len(labels)} labels, but no output has a last axis of that length: {shapes}")
    with staged_directory(out_dir) as staging:
        path = staging / INFERENCE_NAMES[imported.runtime]
        measured = _write_graph(imported, calibration, path, say)
        golden = None
        if calibration is not None:
            golden = write_golden(path, calibration, inputs=imported.inputs, tolerance=DEFAULT_LOGIT_TOLERANCE)
        manifest = ModelManifest(
            model=model,
            version=version,
            runtime=imported.runtime,
            inputs=imported.inputs,
            outputs=imported.outputs,
            labels=labels,
            files={path.name: describe_file(path)},
            golden=golden,
            quality=measure(lambda inputs: run_batches(open_graph(path), inputs)),
            measured=measured,
        )
        (staging / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest


def make_up_inputs(specs: tuple[TensorSpec, ...], rows: int) -> dict[str, npt.NDArray[Any]]:
    """Return inputs by name for who has no data: normal numbers, zeros where an index is likely, empty strings."""
    generator = np.random.default_rng(0)
    made_up: dict[str, npt.NDArray[Any]] = {}
    for spec in specs:
        shape = (rows, *spec.row_shape)
        if spec.dtype == "string":
            made_up[spec.name] = np.full(shape, "", object)
        elif spec.dtype.startswith("float"):
            made_up[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        else:
            made_up[spec.name] = np.zeros(shape, spec.dtype)
    return made_up


def _read_onnx(graph: Graph) -> tuple[TensorSpec, ...]:
    assert isinstance(graph, OnnxGraph)
    for tensor in graph.session.get_outputs():
        if not tensor.type.startswith("tensor("):
            raise DefinitionError(
                f"output {tensor.name!r} is {tensor.type}, devices answer with tensors; "
                "with skl2onnx: to_onnx(..., options={'zipmap': False})"
            )
    return tuple(_build_spec(tensor.name, tensor.shape, tensor.type) for tensor in graph.session.get_inputs())


def _build_spec(name: str, shape: list[Any], kind: str) -> TensorSpec:
    element = kind.removeprefix("tensor(").removesuffix(")")
    dtype = _ONNX_DTYPES.get(element, element)
    if dtype not in DTYPES:
        raise DefinitionError(f"input {name!r} is {kind}, devices take tensors of {', '.join(DTYPES)}")
    if not shape or isinstance(shape[0], int):
        raise DefinitionError(f"input {name!r} has shape {shape}: its first axis must be free, it becomes the batch")
    return _check_rows(name, shape[1:], dtype)


def _read_tflite(graph: TfliteGraph) -> tuple[TensorSpec, ...]:
    specs = []
    for name, details in graph.inputs.items():
        shape, dtype = details["shape_signature"].tolist(), np.dtype(details["dtype"]).name
        if dtype not in DTYPES:
            raise DefinitionError(f"input {name!r} is {dtype}, devices take tensors of {', '.join(DTYPES)}")
        if shape[:1] not in ([1], [-1]):
            raise DefinitionError(
                f"input {name!r} has shape {shape}: its first axis must be 1 or free, it is the batch"
            )
        specs.append(_check_rows(name, shape[1:], dtype))
    return tuple(specs)


def _check_rows(name: str, row_shape: list[Any], dtype: str) -> TensorSpec:
    if not all(isinstance(length, int) and length > 0 for length in row_shape):
        raise DefinitionError(f"input {name!r} has rows of shape {row_shape}: only the batch may be free")
    return TensorSpec(name, ("batch", *row_shape), dtype)


def _probe(graph: Graph, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Return what the outputs look like, after runs of several lengths; on zeros too, as a device runs it first."""
    specs: tuple[TensorSpec, ...] = ()
    for rows in _PROBED_ROWS:
        made_up = make_up_inputs(inputs, rows)
        zeros = {name: array if array.dtype == object else np.zeros_like(array) for name, array in made_up.items()}
        for feeds in (zeros, made_up):
            try:
                outputs = graph.run(feeds)
            except Exception as error:  # the runtimes' errors have no base of their own
                raise DefinitionError(f"it does not run on {rows} rows: {error}") from error
            found = tuple(_describe_output(name, array, rows) for name, array in outputs.items())
            if specs and found != specs:
                raise DefinitionError(f"its outputs change with the rows: {specs} for 1, {found} for {rows}")
            specs = found
        _check_finite(graph.run(zeros))
    return specs


def _describe_output(name: str, output: Any, rows: int) -> TensorSpec:
    array = np.asarray(output)
    dtype = "string" if array.dtype.kind in "OUS" else array.dtype.name
    if array.ndim == 0 or len(array) != rows or 0 in array.shape:
        raise DefinitionError(
            f"output {name!r} has shape {array.shape} for {rows} rows: its first axis is not the batch"
        )
    if dtype not in DTYPES:
        raise DefinitionError(f"output {name!r} is {dtype}, devices answer with {', '.join(DTYPES)}")
    return TensorSpec(name, ("batch", *array.shape[1:]), dtype)


def _check_finite(outputs: Arrays) -> None:
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DefinitionError(f"output {name!r} is not finite on zeros, which a device tries before it serves")


def _parse(path: Path) -> onnx.ModelProto:
    try:
        return load_graph(path)
    except Exception as error:  # protobuf's own
        raise DefinitionError(f"it is no ONNX graph: {error}") from error


def _write_graph(imported: ImportedGraph, calibration: Arrays | None, path: Path, say: Say) -> Measured | None:
    """Write the graph to `path`: in int8 if that can be made, is smaller and answers alike, else as it is."""
    measured = None
    if calibration is not None and imported.runtime == "onnx":
        measured = _quantize(imported, calibration, path, say)
    if measured is None or measured.packaged == "float32":
        path.write_bytes(imported.path.read_bytes())
    return measured


def _quantize(imported: ImportedGraph, calibration: Arrays, path: Path, say: Say) -> Measured | None:
    graph = load_graph(imported.path)
    (first, *others) = imported.inputs
    if others or first.dtype != "float32" or is_quantized(graph):
        say("kept as it is: only float graphs of one input are quantized")
        return None
    try:
        quantize(graph, calibration[first.name], "static", path)
        outputs = run_batches(open_graph(path), calibration)
    except Exception as error:  # noqa: BLE001 - the quantizer raises whatever its many parts raise
        say(f"kept as it is: onnxruntime cannot quantize it: {' '.join(str(error).split()):.200}")
        return None
    rows = {first.name: calibration[first.name][:BATCH]}
    measured = choose_precision(measure_figures(imported.path, rows), measure_figures(path, rows), "size")
    strayed = _compute_largest_deviation(outputs, imported.run(calibration))
    if measured.packaged == "int8" and not strayed <= DEFAULT_LOGIT_TOLERANCE:
        say(f"kept in float32: int8 outputs stray by {strayed:.3f} of their spread")
        return replace(measured, packaged="float32")
    return measured


def _compute_largest_deviation(packaged: Arrays, exact: Arrays) -> float:
    return max(
        (compute_deviation(packaged[name], array) for name, array in exact.items() if array.dtype.kind == "f"),
        default=0.0,
    )
