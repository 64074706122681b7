"""One loaded model version: what it takes to load it, and the way from checked inputs to outputs."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
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
_ALIKE = 1e-4  # kernels may add in another order, not more
_PROBE_ROW_MAX_S = 2e-3  # of a slower model, a batch would hold up everybody else for too long


class ServedModel:
    """A model version that answers.

    Attributes:
        manifest: What it is.
        version: Its number as URLs have it.
        statistics: What it has done since it was loaded.
        batching_pays: Whether requests that come together are answered sooner as one batch, and alike.
        row_s: What one row took when it was loaded, s.
    """

    def __init__(self, manifest: ModelManifest, backend: Backend) -> None:
        self.manifest = manifest
        self.version = str(manifest.version)
        self.statistics = ModelStatistics()
        self.batching_pays = False
        self.row_s = 0.0
        self._run = backend.run
        self._output_names = tuple(backend.output_names)
        self._only_output = self._output_names[0] if len(self._output_names) == 1 else ""  # saves a microsecond
        self._inputs = tuple((spec.name, spec.numpy_dtype, spec.row_shape) for spec in manifest.inputs)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, for a batch of rows.

        Args:
            inputs: By name, each of shape (rows, *row shape) and the dtype in the manifest; rows >= 1,
                the same in all. Whether NaN is a value is the model's business.

        Raises:
            RequestError: The inputs are not what the manifest says, or the graph fails on them.
        """
        self.check(inputs)
        outputs = self._run(inputs)
        if self._only_output:
            return {self._only_output: outputs[0]}
        return dict(zip(self._output_names, outputs, strict=True))

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise RequestError if `inputs` are not what the manifest says."""
        rows = 0
        for name, dtype, row_shape in self._inputs:
            array = inputs.get(name)
            if array is None or (array.dtype is not dtype and array.dtype != dtype):
                break
            shape = array.shape
            if not shape or shape[1:] != row_shape or shape[0] == 0 or (rows and shape[0] != rows):
                break
            rows = shape[0]
        else:
            if len(inputs) == len(self._inputs):
                return
        raise RequestError(self._explain(inputs))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `infer`, for inputs that have been checked, and counted in the statistics."""
        started_ns = time.perf_counter_ns()
        outputs = self._run(inputs)
        self.statistics.record_execution(time.perf_counter_ns() - started_ns)
        return dict(zip(self._output_names, outputs, strict=True))

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


def find_backend(runtime: Runtime) -> Callable[..., Backend]:
    """Return what opens a graph of `runtime`, given the paths of a version's serving files; only now is it imported."""
    if runtime == "tflite":
        from edge_agent.inference.tflite_backend import TfliteBackend

        return TfliteBackend
    from edge_agent.inference.onnx_backend import OnnxBackend

    return OnnxBackend


def load_version(directory: Path) -> ServedModel:
    """Return the version in `directory`, its graph and weights verified by the manifest's digests.

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
        for name in manifest.serving_names:
            path = directory / name
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest.files[name].digest:
                    raise StalledError(f"{path}: not the file that {MANIFEST_NAME} names: its digest is another")
    except OSError as error:
        raise StalledError(f"{error.filename}: {error.strerror}") from error
    return manifest


def load_model(directory: Path, manifest: ModelManifest) -> ServedModel:
    """Return the version in `directory`, loaded, warmed up and measured.

    Raises:
        StalledError: It does not load, or does not answer as its manifest says.
    """
    backend = find_backend(manifest.runtime)(*(directory / name for name in manifest.serving_names))
    _check_names("inputs", backend.input_names, manifest.inputs)
    _check_names("outputs", backend.output_names, manifest.outputs)
    model = ServedModel(manifest, backend)
    for rows in _WARM_UP_ROWS:
        outputs = _run_on_zeros(model, rows)
        for spec in manifest.outputs:
            _check_output(outputs[spec.name], spec, rows)
    model.row_s = _measure(model, 1)
    model.batching_pays = _measure_batching(model) and _answers_alike(model)
    model.statistics = ModelStatistics()
    return model


def _run_on_zeros(model: ServedModel, rows: int) -> dict[str, Array]:
    try:
        return model.infer(build_zeros(model.manifest, rows))
    except AgentError as error:
        raise StalledError(f"{model.manifest.model} {model.version}: zeros of {rows} rows: {error}") from error


def _measure_batching(model: ServedModel) -> bool:
    if model.row_s > _PROBE_ROW_MAX_S:
        return False
    try:
        return _measure(model, _PROBE_ROWS) < model.row_s * _PROBE_ROWS / 2
    except RequestError:  # it takes one or two rows, not sixteen
        return False


def _answers_alike(model: ServedModel) -> bool:
    """Return whether a row's answer does not depend on what else is in its batch, as with scales taken from it."""
    both = {name: array.copy() for name, array in build_zeros(model.manifest, 2).items()}
    for array in both.values():
        if array.dtype.kind == "f":
            wave = np.sin(np.arange(array[0].size)).reshape(array.shape[1:])  # numpy.random would take 2 MB
            array[0], array[1] = wave, 30 * wave[..., ::-1] if wave.ndim else 30.0
        elif array.dtype.kind in "iub":
            array[1] = 1
    try:
        together = model.run(both)
        alone = [model.run({name: array[row : row + 1] for name, array in both.items()}) for row in (0, 1)]
    except RequestError:
        return False
    return all(_is_same(array, np.concatenate([each[name] for each in alone])) for name, array in together.items())


def _is_same(one: Array, other: Array) -> bool:
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    room = _ALIKE * float(np.abs(other, dtype=np.float64).max(initial=0.0))
    return np.allclose(one, other, rtol=_ALIKE, atol=room, equal_nan=True)


def _measure(model: ServedModel, rows: int) -> float:
    """Return the shortest time of a few runs, s."""
    zeros, times_s = build_zeros(model.manifest, rows), []
    for _ in range(_PROBE_TRIES):
        started_s = time.perf_counter()
        model.infer(zeros)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def build_zeros(manifest: ModelManifest, rows: int) -> dict[str, Array]:
    """Return inputs by name for `rows` rows of zeros and empty strings."""
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
