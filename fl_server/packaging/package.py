"""A model version from an exported architecture and parameters: an immutable folder, defined by its manifest."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fl_server.errors import UsageError
from fl_server.packaging.architecture import Architecture, check_parameters
from fl_server.packaging.graphs import build_with_parameters, load_graph, save_graph
from fl_server.packaging.quantize import quantize
from fl_server.packaging.staging import staged_directory
from models.contract.encoding import build_digest
from models.contract.manifest import (
    EVALUATE_NAME,
    INFERENCE_NAMES,
    MANIFEST_NAME,
    PARAMETERS_NAME,
    TRAIN_STEP_NAME,
    FileEntry,
    Lineage,
    ModelManifest,
    Quality,
    build_manifest,
)
from models.contract.privacy import PrivacyStatement


def package_version(
    architecture: Architecture,
    *,
    parameters: Mapping[str, npt.NDArray[np.float32]],
    version: int,
    calibration: npt.NDArray[Any],
    measure: Callable[[Path, Path], Quality | None],
    lineage: Lineage,
    privacy: PrivacyStatement | None,
    out_dir: Path,
) -> ModelManifest:
    """Write a model version to `out_dir`, which appears whole and durable or not at all.

    Args:
        architecture: Its step graphs become part of the version.
        parameters: Finite float32 arrays by the names of the architecture's layout.
        version: Counts up from 1 within the model.
        calibration: Inputs, shape (n, ...), n >= 1; none of a device's own data.
        measure: Given the quantized and the float inference graph, says what the version is worth, if that is known.
        lineage: Where the parameters come from.
        privacy: What may be claimed of them; None says nothing.
        out_dir: Must not exist; its parent must.

    Raises:
        UsageError: `out_dir` exists, or `parameters` or `calibration` do not fit the architecture.
    """
    _check_arguments(architecture, parameters, calibration, out_dir)
    with staged_directory(out_dir) as staging:
        inference_path = staging / INFERENCE_NAMES["onnx"]
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}~", dir=out_dir.parent) as scratch:
            float_path = Path(scratch, "float.onnx")
            graph = build_with_parameters(load_graph(architecture.float_path), parameters)
            save_graph(graph, float_path)
            quantize(graph, calibration, architecture.quantization, inference_path)
            quality = measure(inference_path, float_path)
        shutil.copyfile(architecture.train_step_path, staging / TRAIN_STEP_NAME)
        shutil.copyfile(architecture.evaluate_path, staging / EVALUATE_NAME)
        (staging / PARAMETERS_NAME).write_bytes(save(dict(parameters)))
        manifest = ModelManifest(
            model=architecture.model,
            version=version,
            runtime="onnx",
            inputs=architecture.inputs,
            outputs=architecture.outputs,
            labels=architecture.labels,
            files={path.name: _describe(path) for path in sorted(staging.iterdir())},
            training=architecture.training,
            lineage=lineage,
            privacy=privacy,
            quality=quality,
        )
        (staging / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest


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


def _describe(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(digest=build_digest(data), size_bytes=len(data))
