"""The model a device answers with: load, check, run, and change for another under load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from edge_agent.errors import AgentError, RequestError, StalledError
from edge_agent.inference.backend import Array, Backend
from edge_agent.inference.onnx_backend import OnnxBackend
from models.contract.manifest import ModelManifest
from models.tensors.spec import TensorSpec

_WARM_UP_ROWS = (1, 2)  # the smallest batches of which one shows that the batch axis is free


class ServedModel:
    """One loaded model version."""

    def __init__(self, manifest: ModelManifest, backend: Backend) -> None:
        self.manifest = manifest
        self._backend = backend
        self._inputs = {spec.name: (spec, np.dtype(spec.dtype), spec.row_shape) for spec in manifest.inputs}

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, for a batch of rows.

        Args:
            inputs: By name, each of shape (rows, *row shape) and the dtype in the manifest; rows >= 1,
                the same in all. Whether NaN is a value is the model's business.

        Raises:
            RequestError: The inputs are not what the manifest says, or the graph fails on them.
        """
        self._check_inputs(inputs)
        return dict(zip(self._backend.output_names, self._backend.run(inputs), strict=True))

    def _check_inputs(self, inputs: Mapping[str, Array]) -> None:
        if inputs.keys() != self._inputs.keys():
            raise RequestError(f"expected inputs {_names(self._inputs)}, got {_names(inputs)}")
        rows = 0
        for name, array in inputs.items():
            spec, dtype, row_shape = self._inputs[name]
            if array.dtype != dtype:
                raise RequestError(f"input {name!r}: expected {spec.dtype}, got {array.dtype}")
            if array.shape[1:] != row_shape or array.ndim == 0 or len(array) == 0:
                expected = ", ".join(["rows", *map(str, row_shape)])
                raise RequestError(f"input {name!r}: expected shape ({expected}) with rows >= 1, got {array.shape}")
            if rows not in (0, len(array)):
                raise RequestError(f"input {name!r}: expected {rows} rows as in the other inputs, got {len(array)}")
            rows = len(array)


class Engine:
    """Holds the active model; a request keeps the model it began with until it is answered."""

    def __init__(self) -> None:
        self._active: ServedModel | None = None

    @property
    def active(self) -> ServedModel | None:
        """The model to answer with, None before the first activation."""
        return self._active

    def activate(self, model: ServedModel | None) -> None:
        """Answer with `model` from now on; the old one is released after the last request that holds it."""
        self._active = model


def load_model(directory: Path, manifest: ModelManifest) -> ServedModel:
    """Return the version in `directory`, loaded and warmed up.

    Raises:
        StalledError: It does not load, or does not answer as its manifest says.
    """
    backend = _open_backend(manifest.runtime, directory / manifest.inference_name)
    _check_names("inputs", backend.input_names, manifest.inputs)
    _check_names("outputs", backend.output_names, manifest.outputs)
    model = ServedModel(manifest, backend)
    for rows in _WARM_UP_ROWS:
        zeros = {spec.name: np.zeros((rows, *spec.row_shape), spec.dtype) for spec in manifest.inputs}
        try:
            outputs = model.infer(zeros)
        except AgentError as error:
            raise StalledError(f"{manifest.model} {manifest.version}: zeros of {rows} rows: {error}") from error
        for spec in manifest.outputs:
            _check_output(outputs[spec.name], spec, rows)
    return model


def _open_backend(runtime: Literal["onnx", "tflite"], path: Path) -> Backend:
    if runtime != "onnx":
        raise StalledError(f"{path.name}: this agent runs ONNX graphs, not {runtime}")
    return OnnxBackend(path)


def _check_names(what: str, found: Sequence[str], specs: tuple[TensorSpec, ...]) -> None:
    if sorted(found) != (expected := sorted(spec.name for spec in specs)):
        raise StalledError(f"the graph's {what} are {sorted(found)}, its manifest says {expected}")


def _check_output(array: Array, spec: TensorSpec, rows: int) -> None:
    expected = (rows, *spec.row_shape)
    if array.shape != expected or array.dtype != np.dtype(spec.dtype):
        raise StalledError(
            f"output {spec.name!r} has shape {array.shape} and {array.dtype}, its manifest says {expected} and {spec.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise StalledError(f"output {spec.name!r} is not finite on zeros")


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"
