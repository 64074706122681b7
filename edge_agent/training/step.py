"""The training step of one version: sums of clipped gradients over any number of samples, whatever engine takes them.

What clips is an engine: the signed step graph in onnxruntime, or, for a model whose step has no graph, Opacus on torch.
It is not trusted here: what one sample can add to its sums is measured when the step is opened.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_agent.errors import EngineError, StalledError
from edge_agent.training.onnx_engine import OnnxEngine
from edge_agent.training.sensitivity import ROWS, check_sensitivity, random_rows
from models.contract.encoding import build_digest
from models.contract.manifest import ModelManifest
from models.tensors.layout import Vector

_Floats: TypeAlias = npt.NDArray[np.float64]
_Array: TypeAlias = npt.NDArray[Any]


class Engine(Protocol):
    """Takes and returns what a train step graph does."""

    def bind(self, inputs: Mapping[str, _Array], outputs: Sequence[_Array]) -> Callable[[], None]:
        """Return what runs the step from `inputs` into `outputs`, arrays that the caller keeps and fills anew.

        It raises whatever its library does, and the text may quote a sample.

        Args:
            inputs: `x`, `y` and `mask`, first axis the version's batch; `clipping_norm`, a scalar; each parameter. Rows
                without a mask add nothing.
            outputs: The sums of clipped gradients by parameter, in the order of the layout; the norms before clipping.
        """
        ...


class Step:
    """An open step that was seen to clip.

    Attributes:
        size: Number of parameters.
        is_local: Which of them never leave the device, shape (size,), bool.
    """

    def __init__(self, engine: Engine, manifest: ModelManifest) -> None:
        """Take `engine` for the step of `manifest`, and measure its sensitivity on random data.

        Raises:
            StalledError: Nothing bounds what a sample adds.
        """
        assert manifest.training is not None
        self._contract, self._input = manifest.training, manifest.training_input
        layout, batch = self._contract.layout, self._contract.batch
        self.size, self.is_local = layout.size, layout.mark(self._contract.local)
        self._x, self._y = (
            np.zeros((batch, *spec.row_shape), spec.dtype) for spec in (self._input, self._contract.target)
        )
        self._mask, self._norms, self._clipping_norm = (np.zeros(shape, np.float32) for shape in (batch, batch, ()))
        self._parameters, self._sums = np.zeros(self.size, np.float32), np.zeros(self.size, np.float32)
        self._exact_sums = np.zeros(self.size)
        rows = {"x": self._x, "y": self._y, "mask": self._mask, "clipping_norm": self._clipping_norm}
        self._run = engine.bind(
            {**rows, **layout.unflatten(self._parameters)},
            [*layout.unflatten(self._sums).values(), self._norms],
        )
        self._check_clips(np.random.default_rng())

    def clipped_sum(self, x: _Array, y: _Array, clipping_norm: float, parameters: Vector) -> _Floats:
        """Return the sum of the samples' clipped gradients, of any number of rows, flat, float64."""
        total, batch = np.zeros(self.size), self._contract.batch
        self._clipping_norm[...] = clipping_norm
        np.copyto(self._parameters, parameters)
        for start in range(0, len(x), batch):
            self._add_bounded(x[start : start + batch], y[start : start + batch], total)
        return total

    def _add_bounded(self, x: _Array, y: _Array, total: _Floats) -> None:
        """Add the sum of one batch, in which a sample that the engine cannot take adds nothing.

        A gradient that is not finite, or a label out of range, must neither spoil nor mark the sum of the
        others: it is looked for by halves.
        """
        if self._takes(x, y) and np.isfinite(self._sums).all():
            np.copyto(
                self._exact_sums, self._sums
            )  # adding them as they are takes longer: in pieces, each changed first
            np.add(total, self._exact_sums, out=total)
        elif len(x) > 1:
            half = len(x) // 2
            self._add_bounded(x[:half], y[:half], total)
            self._add_bounded(x[half:], y[half:], total)

    def _takes(self, x: _Array, y: _Array) -> bool:
        """Let the engine write the sums of 1 to `batch` rows; return whether it could take them."""
        for kept, rows in ((self._x, x), (self._y, y)):
            kept[: len(rows)] = rows
            kept[len(rows) :] = rows[0]  # masked, and as finite as the first, whatever the model
        self._mask[: len(x)], self._mask[len(x) :] = 1, 0
        try:
            self._run()
        except Exception:  # noqa: BLE001 - an engine's errors share no base; their text may quote a sample
            return False
        return True

    def _check_clips(self, generator: np.random.Generator) -> None:
        # A tenth: small enough that a deep network's outputs do not saturate and hide its gradients.
        parameters = (0.1 * generator.standard_normal(self.size)).astype(np.float32)

        def random_samples() -> tuple[_Array, _Array]:
            rows = min(ROWS, self._contract.batch)
            return random_rows(self._input, rows, generator), random_rows(self._contract.target, rows, generator)

        check_sensitivity(
            lambda x, y, clipping_norm: self.clipped_sum(x, y, clipping_norm, parameters),
            random_samples(),
            random_samples(),
        )


def open_step(directory: Path, manifest: ModelManifest, definition: str | None = None) -> Step:
    """Return the step of the version in `directory`.

    Args:
        directory: Holds the graph that `manifest` names.
        manifest: Of the version; says which engine runs it.
        definition: `FILE.py:NAME` of the model's definition on this device, for the Opacus engine.

    Raises:
        EngineError: The Opacus engine, or the definition that it needs, is not on this device.
        StalledError: The version cannot be trained, a file is missing or another, or the step is unfit.
    """
    if manifest.training is None:
        raise StalledError(f"version {manifest.version} of {manifest.model!r} cannot be trained")
    graph = _read_graph(directory / manifest.training.step_name, manifest)
    if manifest.training.engine == "onnx":
        return Step(OnnxEngine(graph, manifest.training.layout), manifest)
    reason = f"version {manifest.version} of {manifest.model!r} trains with the Opacus engine, which needs"
    if definition is None:
        raise EngineError(f"{reason} its definition on this device: federation.definition is not set")
    try:
        # Here, and only where it is asked for: torch and Opacus take 300 MB.
        from edge_agent.training.opacus_engine import OpacusEngine
    except ImportError as error:
        raise EngineError(f"{reason} 'edge-fl[opacus]' on this device: {error}") from error
    return Step(OpacusEngine(definition, manifest, graph), manifest)


def _read_graph(path: Path, manifest: ModelManifest) -> bytes:
    """Return the graph at `path`, if it is the one that `manifest` names."""
    entry = manifest.files[path.name]
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror or error}") from error
    if (digest := build_digest(graph)) != entry.digest:
        raise StalledError(f"{path} has digest {digest}, expected {entry.digest}")
    return graph
