"""One loaded model version: what it takes to load it, and the way from checked inputs to outputs."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_agent.errors import AgentError, RequestError, StalledError
from edge_agent.inference.backend import Array, Backend
from edge_agent.inference.statistics import ModelStatistics
from models.contract.manifest import MANIFEST_NAME, ModelManifest, Runtime, parse_manifest
from models.tensors.spec import TensorSpec

_WARM_UP_ROWS = (1, 2)  # the smallest batches of which one shows that the batch axis is free
_PROBE_ROWS = 16  # a batch of these must cost less than half of them one by one
_PROBE_TRIES = 3
_PROBE_ROW_MAX_S = 2e-3  # of a slower model, a batch would hold up everybody else for too long


class ServedModel:
    """A model version that answers.

    Attributes:
        manifest: What it is.
        version: Its number as URLs have it.
        statistics: What it has done since it was loaded.
        batching_pays: Whether requests that come together are answered sooner as one batch.
    """

    def __init__(self, manifest: ModelManifest, backend: Backend) -> None:
        self.manifest = manifest
        self.version = str(manifest.version)
        self.statistics = ModelStatistics()
        self.batching_pays = False
        self._run = backend.run
        self._output_names = tuple(backend.output_names)
        self._inputs = tuple((spec.name, spec.numpy_dtype, spec.row_shape) for spec in manifest.inputs)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, for a batch of rows.

        Args:
            inputs: By name, each of shape (rows, *row shape) and the dtype in the manifest; rows >= 1,
                the same in all. Whether NaN is a value is the model's business.

        Raises:
            RequestError: The inputs are not what the manifest says, or the graph fails on them.
        """
        if not self._fits(inputs):
            raise RequestError(self._explain(inputs))
        started_ns = time.perf_counter_ns()
        outputs = self._run(inputs)
        self.statistics.record_execution(time.perf_counter_ns() - started_ns)
        return dict(zip(self._output_names, outputs, strict=True))

    def _fits(self, inputs: Mapping[str, Array]) -> bool:
        rows = 0
        for name, dtype, row_shape in self._inputs:
            array = inputs.get(name)
            if array is None or array.dtype != dtype:
                return False
            shape = array.shape
            if not shape or shape[1:] != row_shape or shape[0] == 0 or (rows and shape[0] != rows):
                return False
            rows = shape[0]
        return len(inputs) == len(self._inputs)

    def _explain(self, inputs: Mapping[str, Array]) -> str:
        """Return why `inputs` do not fit."""
        expected = {spec.name: spec for spec in self.manifest.inputs}
        if inputs.keys() != expected.keys():
            return f"expected inputs {_names(expected)}, got {_names(inputs)}"
        rows = 0
        for name, spec in expected.items():
            array = inputs[name]
            if array.dtype != spec.numpy_dtype:
                return f"input {name!r}: expected {spec.dtype}, got {array.dtype}"
            if array.ndim == 0 or array.shape[1:] != spec.row_shape or len(array) == 0:
                shape = ", ".join(["rows", *map(str, spec.row_shape)])
                return f"input {name!r}: expected shape ({shape}) with rows >= 1, got {array.shape}"
            if rows not in (0, len(array)):
                return f"input {name!r}: expected {rows} rows as in the other inputs, got {len(array)}"
            rows = len(array)
        return "the inputs changed while they were checked"


def load_version(directory: Path) -> ServedModel:
    """Return the version in `directory`, its graph verified by the manifest's digest.

    Raises:
        StalledError: A file is missing or is not what the manifest says, or as `load_model`.
        MalformedError: The manifest is none.
    """
    manifest = load_manifest(directory)
    return load_model(directory, manifest)


def load_manifest(directory: Path) -> ModelManifest:
    """Return the manifest of the version in `directory`, whose graph is there and as it says; raises as `load_version`."""
    try:
        manifest = parse_manifest((directory / MANIFEST_NAME).read_bytes())
        entry, path = manifest.files[manifest.inference_name], directory / manifest.inference_name
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.digest:
                raise StalledError(f"{path}: not the file that {MANIFEST_NAME} names: its digest is another")
    except OSError as error:
        raise StalledError(f"{error.filename}: {error.strerror}") from error
    return manifest


def load_model(directory: Path, manifest: ModelManifest) -> ServedModel:
    """Return the version in `directory`, loaded, warmed up and measured.

    Raises:
        StalledError: It does not load, or does not answer as its manifest says.
    """
    backend = _open_backend(manifest.runtime, directory / manifest.inference_name)
    _check_names("inputs", backend.input_names, manifest.inputs)
    _check_names("outputs", backend.output_names, manifest.outputs)
    model = ServedModel(manifest, backend)
    for rows in _WARM_UP_ROWS:
        outputs = _run_on_zeros(model, rows)
        for spec in manifest.outputs:
            _check_output(outputs[spec.name], spec, rows)
    model.batching_pays = _measure_batching(model)
    model.statistics = ModelStatistics()
    return model


def _open_backend(runtime: Runtime, path: Path) -> Backend:
    if runtime == "tflite":
        from edge_agent.inference.tflite_backend import TfliteBackend

        return TfliteBackend(path)
    from edge_agent.inference.onnx_backend import OnnxBackend

    return OnnxBackend(path)


def _run_on_zeros(model: ServedModel, rows: int) -> dict[str, Array]:
    try:
        return model.infer(_build_zeros(model.manifest, rows))
    except AgentError as error:
        raise StalledError(f"{model.manifest.model} {model.version}: zeros of {rows} rows: {error}") from error


def _measure_batching(model: ServedModel) -> bool:
    one_s = _measure(model, 1)
    if one_s > _PROBE_ROW_MAX_S:
        return False
    try:
        return _measure(model, _PROBE_ROWS) < one_s * _PROBE_ROWS / 2
    except RequestError:  # it takes one or two rows, not sixteen
        return False


def _measure(model: ServedModel, rows: int) -> float:
    """Return the shortest time of a few runs, s."""
    zeros, times_s = _build_zeros(model.manifest, rows), []
    for _ in range(_PROBE_TRIES):
        started_s = time.perf_counter()
        model.infer(zeros)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def _build_zeros(manifest: ModelManifest, rows: int) -> dict[str, Array]:
    return {
        spec.name: np.full((rows, *spec.row_shape), "" if spec.dtype == "string" else 0, spec.numpy_dtype)
        for spec in manifest.inputs
    }


def _check_names(what: str, found: Sequence[str], specs: tuple[TensorSpec, ...]) -> None:
    if sorted(found) != (expected := sorted(spec.name for spec in specs)):
        raise StalledError(f"the graph's {what} are {sorted(found)}, its manifest says {expected}")


def _check_output(array: Array, spec: TensorSpec, rows: int) -> None:
    expected = (rows, *spec.row_shape)
    if array.shape != expected or array.dtype != spec.numpy_dtype:
        raise StalledError(
            f"output {spec.name!r} has shape {array.shape} and {array.dtype}, its manifest says {expected} and {spec.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise StalledError(f"output {spec.name!r} is not finite on zeros")


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"
