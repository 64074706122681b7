"""A model version from an exported architecture and parameters: an immutable folder, defined by its manifest."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fl_server.errors import DefinitionError, UsageError
from fl_server.inference import list_graph_files
from fl_server.packaging.architecture import Architecture, check_parameters
from fl_server.packaging.candidates import Exporter, build_candidates, run_graph
from fl_server.packaging.golden import write_golden
from fl_server.packaging.precision import BATCH, StrayingError, choose_precision, compute_deviation, measure_figures
from fl_server.packaging.staging import describe_file, staged_directory
from models.contract.encoding import build_digest
from models.contract.manifest import (
    INFERENCE_NAMES,
    LOCAL_NAME,
    MANIFEST_NAME,
    PARAMETERS_NAME,
    WEIGHTS_NAME,
    Delta,
    Figures,
    FileEntry,
    Lineage,
    ModelManifest,
    Quality,
    Runtime,
    TrainingContract,
    build_manifest,
    parse_manifest,
)
from models.contract.privacy import PrivacyStatement
from models.definitions.definition import DEFAULT_LOGIT_TOLERANCE
from models.tensors.delta import build_delta
from models.tensors.layout import build_vector_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What packaging works with.

    Attributes:
        measure: Given the packaged graph and the float one, says what the version is worth, if that is known.
        measure_figures: Says what a graph costs on inputs by name.
        tflite: Makes the version's graph for LiteRT; None makes it for onnxruntime.
        running: Folders of the versions that devices run, the champion first, which lends its scales; deltas lead
            from their weights to the new version's.
    """

    measure: Callable[[Path, Path], Quality | None]
    measure_figures: Callable[[Path, Mapping[str, npt.NDArray[Any]]], Figures] = measure_figures
    tflite: Exporter | None = None
    running: Sequence[Path] = ()


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
            candidates = build_candidates(
                architecture,
                parameters,
                calibration,
                tflite=tools.tflite,
                champion_dir=tools.running[0] if tools.running else None,
                directory=Path(scratch),
            )
            rows = {name: calibration[:BATCH]}
            measured = choose_precision(
                tools.measure_figures(candidates.float32_path, rows),
                tools.measure_figures(candidates.int8_path, rows),
                architecture.prefer,
            )
            source, *weights = list_graph_files(candidates.get_path(measured.packaged))
            shutil.copyfile(source, inference_path)
            for path in weights:
                shutil.copyfile(path, staging / WEIGHTS_NAME)
            quality = tools.measure(inference_path, candidates.exact_path)
            _check_graph(architecture, inference_path, calibration, candidates.outputs, quality)
        for graph_name, path in architecture.graph_paths.items():
            shutil.copyfile(path, staging / graph_name)
        (staging / PARAMETERS_NAME).write_bytes(save(dict(parameters)))
        write_local(staging, architecture.training, parameters)
        files = {path.name: describe_file(path) for path in sorted(staging.iterdir())}
        inputs, training = architecture.inputs, architecture.training
        if runtime == "tflite" and inputs[0].dtype == "int64":  # the converter narrows it
            inputs, training = (replace(inputs[0], dtype="int32"),), replace(training, input_dtype="int64")
        golden = write_golden(
            inference_path,
            {name: calibration},
            inputs=inputs,
            tolerance=architecture.logit_tolerance or DEFAULT_LOGIT_TOLERANCE,
        )
        manifest = ModelManifest(
            model=architecture.model,
            version=version,
            runtime=runtime,
            inputs=inputs,
            outputs=architecture.outputs,
            labels=architecture.labels,
            features=architecture.features,
            files=files,
            deltas=_write_deltas(staging, files, tools.running),
            golden=golden,
            training=training,
            lineage=lineage,
            privacy=privacy,
            quality=quality,
            measured=measured,
        )
        (staging / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest


def write_local(directory: Path, training: TrainingContract, parameters: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write to a version's `directory` what local parameters begin with, if it has any."""
    if training.local:
        values = training.layout.select(training.local).flatten({name: parameters[name] for name in training.local})
        (directory / LOCAL_NAME).write_bytes(build_vector_bytes(values))


def _write_deltas(staging: Path, files: Mapping[str, FileEntry], running: Sequence[Path]) -> tuple[Delta, ...]:
    """Write the deltas that lead from the weights of `running` versions to those in `staging`, where they are shorter."""
    name = WEIGHTS_NAME if WEIGHTS_NAME in files else INFERENCE_NAMES["tflite"]
    if name not in files:
        return ()
    result, deltas = (staging / name).read_bytes(), dict[str, Delta]()
    template = files.get(INFERENCE_NAMES["onnx"])
    for directory in running:
        manifest = parse_manifest((directory / MANIFEST_NAME).read_bytes())
        base = manifest.files.get(name)
        if base is None or base.size_bytes != len(result) or manifest.files.get(INFERENCE_NAMES["onnx"]) != template:
            continue
        data = build_delta((directory / name).read_bytes(), result)
        if base != files[name] and len(data) < len(result):
            delta = Delta(base=base.digest, file=FileEntry(digest=build_digest(data), size_bytes=len(data)))
            (staging / delta.name).write_bytes(data)
            deltas[base.digest] = delta
    return tuple(deltas.values())


def _check_graph(
    architecture: Architecture,
    path: Path,
    calibration: npt.NDArray[Any],
    outputs: npt.NDArray[Any],
    quality: Quality | None,
) -> None:
    found = run_graph(architecture, path, calibration[: len(outputs)])
    if found.shape != outputs.shape or found.dtype != outputs.dtype:
        raise DefinitionError(
            f"{architecture.model}: {path.name} answers {found.dtype} of shape {found.shape}, "
            f"the module {outputs.dtype} of shape {outputs.shape}"
        )
    deviation, tolerance = compute_deviation(found, outputs), architecture.logit_tolerance
    if tolerance is not None and not deviation <= tolerance:  # NaN strays too
        raise StrayingError(architecture.model, deviation, tolerance, quality)


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
