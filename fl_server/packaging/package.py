"""A model version from an exported architecture and parameters: an immutable folder, defined by its manifest."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fl_server.errors import DefinitionError, UsageError
from fl_server.inference import open_graph, run_batches
from fl_server.packaging.architecture import Architecture, check_parameters
from fl_server.packaging.graphs import build_with_parameters, load_graph, save_graph
from fl_server.packaging.precision import BATCH, StrayingError, choose_precision, compute_deviation, measure_figures
from fl_server.packaging.quantize import quantize
from fl_server.packaging.staging import staged_directory
from fl_server.packaging.tflite import CALIBRATION_ROWS, FLOAT_NAME, INT8_NAME
from models.contract.encoding import build_digest
from models.contract.manifest import (
    INFERENCE_NAMES,
    MANIFEST_NAME,
    PARAMETERS_NAME,
    Figures,
    FileEntry,
    Lineage,
    ModelManifest,
    Precision,
    Quality,
    Runtime,
    build_manifest,
)
from models.contract.privacy import PrivacyStatement

_FLOAT_NAME = "float.onnx"
_SAME = 1e-3  # between torch and onnxruntime, relative to the largest output


class Exporter(Protocol):
    """What makes TFLite graphs, `FLOAT_NAME` and `INT8_NAME` in a folder; returns the torch module's own outputs."""

    def export(
        self, parameters: Mapping[str, npt.NDArray[np.float32]], calibration: npt.NDArray[Any], directory: Path
    ) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What packaging has others do.

    Attributes:
        measure: Given the packaged graph and the float one, says what the version is worth, if that is known.
        measure_figures: Says what a graph costs on inputs by name.
        tflite: Makes the version's graph for LiteRT; None makes it for onnxruntime.
    """

    measure: Callable[[Path, Path], Quality | None]
    measure_figures: Callable[[Path, Mapping[str, npt.NDArray[Any]]], Figures] = measure_figures
    tflite: Exporter | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidates:
    """Two graphs of the same parameters, and what the module itself answers to the first calibration inputs."""

    float32_path: Path
    int8_path: Path
    outputs: npt.NDArray[Any]

    def get_path(self, precision: Precision) -> Path:
        return self.int8_path if precision == "int8" else self.float32_path


def package_version(
    architecture: Architecture,
    *,
    parameters: Mapping[str, npt.NDArray[np.float32]],
    version: int,
    calibration: npt.NDArray[Any],
    tools: Tools,
    lineage: Lineage,
    privacy: PrivacyStatement | None,
    out_dir: Path,
) -> ModelManifest:
    """Write a model version to `out_dir`, which appears whole and durable or not at all.

    Args:
        architecture: Its training graphs become part of the version.
        parameters: Finite float32 arrays by the names of the architecture's layout.
        version: Counts up from 1 within the model.
        calibration: Inputs, shape (n, ...), n >= 1; none of a device's own data.
        tools: Measures, and chooses the runtime.
        lineage: Where the parameters come from.
        privacy: What may be claimed of them; None says nothing.
        out_dir: Must not exist; its parent must.

    Raises:
        UsageError: `out_dir` exists, or `parameters` or `calibration` do not fit the architecture.
        StrayingError: The graph to package strays too far from the module.
    """
    _check_arguments(architecture, parameters, calibration, out_dir)
    runtime: Runtime = "onnx" if tools.tflite is None else "tflite"
    name = architecture.inputs[0].name
    with staged_directory(out_dir) as staging:
        inference_path = staging / INFERENCE_NAMES[runtime]
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}~", dir=out_dir.parent) as scratch:
            candidates = _build_candidates(architecture, parameters, calibration, tools.tflite, Path(scratch))
            rows = {name: calibration[:BATCH]}
            measured = choose_precision(
                tools.measure_figures(candidates.float32_path, rows),
                tools.measure_figures(candidates.int8_path, rows),
                architecture.prefer,
            )
            shutil.copyfile(candidates.get_path(measured.packaged), inference_path)
            quality = tools.measure(inference_path, Path(scratch, _FLOAT_NAME))
            _check_graph(architecture, inference_path, calibration, candidates.outputs, quality)
        for graph_name, path in architecture.graph_paths.items():
            shutil.copyfile(path, staging / graph_name)
        (staging / PARAMETERS_NAME).write_bytes(save(dict(parameters)))
        inputs, training = architecture.inputs, architecture.training
        if runtime == "tflite" and inputs[0].dtype == "int64":  # the converter narrows it
            inputs, training = (replace(inputs[0], dtype="int32"),), replace(training, input_dtype="int64")
        manifest = ModelManifest(
            model=architecture.model,
            version=version,
            runtime=runtime,
            inputs=inputs,
            outputs=architecture.outputs,
            labels=architecture.labels,
            features=architecture.features,
            files={path.name: describe_file(path) for path in sorted(staging.iterdir())},
            training=training,
            lineage=lineage,
            privacy=privacy,
            quality=quality,
            measured=measured,
        )
        (staging / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest


def _build_candidates(
    architecture: Architecture,
    parameters: Mapping[str, npt.NDArray[np.float32]],
    calibration: npt.NDArray[Any],
    tflite: Exporter | None,
    directory: Path,
) -> _Candidates:
    float_path = directory / _FLOAT_NAME
    graph = build_with_parameters(load_graph(architecture.float_path), parameters)
    save_graph(graph, float_path)
    checked = calibration[:CALIBRATION_ROWS]
    outputs = _run(architecture, float_path, checked)
    if tflite is None:
        int8_path = directory / "int8.onnx"
        quantize(graph, calibration, architecture.quantization, int8_path)
        return _Candidates(float32_path=float_path, int8_path=int8_path, outputs=outputs)
    exact = tflite.export(parameters, checked, directory)
    if exact.shape != outputs.shape or not np.allclose(
        exact, outputs, rtol=0, atol=_SAME * max(1.0, float(np.abs(outputs).max()))
    ):
        raise UsageError(f"{architecture.model}: the definition no longer is the one that was exported; export it anew")
    return _Candidates(float32_path=directory / FLOAT_NAME, int8_path=directory / INT8_NAME, outputs=exact)


def _check_graph(
    architecture: Architecture,
    path: Path,
    calibration: npt.NDArray[Any],
    outputs: npt.NDArray[Any],
    quality: Quality | None,
) -> None:
    found = _run(architecture, path, calibration[: len(outputs)])
    if found.shape != outputs.shape or found.dtype != outputs.dtype:
        raise DefinitionError(
            f"{architecture.model}: {path.name} answers {found.dtype} of shape {found.shape}, "
            f"the module {outputs.dtype} of shape {outputs.shape}"
        )
    deviation, tolerance = compute_deviation(found, outputs), architecture.logit_tolerance
    if tolerance is not None and not deviation <= tolerance:  # NaN strays too
        raise StrayingError(architecture.model, deviation, tolerance, quality)


def _run(architecture: Architecture, path: Path, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    outputs = run_batches(open_graph(path), {architecture.inputs[0].name: inputs})
    return outputs[architecture.outputs[0].name]


def _check_arguments(
    architecture: Architecture,
    parameters: Mapping[str, npt.NDArray[np.float32]],
    calibration: npt.NDArray[Any],
    out_dir: Path,
) -> None:
    if out_dir.exists():
        raise UsageError(f"{out_dir} exists: a version is immutable")
    try:
        check_parameters(parameters, architecture.training.layout)
    except ValueError as error:
        raise UsageError(f"{architecture.model}: {error}") from error
    spec = architecture.inputs[0]
    if calibration.shape[1:] != spec.row_shape or str(calibration.dtype) != spec.dtype or not len(calibration):
        raise UsageError(
            f"{architecture.model}: calibration data is {calibration.dtype} of shape {calibration.shape}, "
            f"input {spec.name!r} is {spec.dtype} of shape {spec.shape}"
        )


def describe_file(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(digest=build_digest(data), size_bytes=len(data))
