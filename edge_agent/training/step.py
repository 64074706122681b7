"""The training step of one version: sums of clipped gradients over any number of samples, whatever engine takes them.

What clips is an engine: the signed step graph in onnxruntime, or, for a model whose step has no graph, Opacus on torch.
It is not trusted here: what one sample can add to its sums is measured when the step is opened.
"""

from collections.abc import Mapping, Sequence
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
from models.tensors.spec import TensorSpec

_Floats: TypeAlias = npt.NDArray[np.float64]
_Array: TypeAlias = npt.NDArray[Any]


class Engine(Protocol):
    """Takes and returns what a train step graph does."""

    def run(self, feeds: Mapping[str, _Array]) -> Sequence[_Array]:
        """Return the sums of clipped gradients by parameter, in the order of the layout, and the norms before clipping.

        Args:
            feeds: `x`, `y` and `mask`, first axis the version's batch; `clipping_norm`, a scalar; each parameter. Rows
                without a mask add nothing.

        Raises:
            Exception: Whatever its library does; the text may quote a sample.
        """
        ...


class Step:
    """An open step that was seen to clip.

    Attributes:
        size: Number of parameters.
    """

    def __init__(self, engine: Engine, manifest: ModelManifest) -> None:
        """Take `engine` for the step of `manifest`, and measure its sensitivity on random data.

        Raises:
            StalledError: Nothing bounds what a sample adds.
        """
        assert manifest.training is not None
        self._engine, self._contract, self._input = engine, manifest.training, manifest.training_input
        self.size = self._contract.layout.size
        self._check_clips(np.random.default_rng())

    def clipped_sum(self, x: _Array, y: _Array, clipping_norm: float, parameters: Vector) -> _Floats:
        """Return the sum of the samples' clipped gradients, of any number of rows, flat, float64."""
        total = np.zeros(self.size)
        layout, batch = self._contract.layout, self._contract.batch
        feeds = {"clipping_norm": np.asarray(clipping_norm, np.float32), **layout.unflatten(parameters)}
        totals = list(layout.unflatten(total).values())
        for start in range(0, len(x), batch):
            self._add_bounded(x[start : start + batch], y[start : start + batch], feeds, totals)
        return total

    def _add_bounded(self, x: _Array, y: _Array, feeds: dict[str, _Array], totals: list[_Floats]) -> None:
        """Add the sum of one batch, in which a sample that the engine cannot take adds nothing.

        A gradient that is not finite, or a label out of range, must neither spoil nor mark the sum of the
        others: it is looked for by halves.
        """
        parts = self._run(x, y, feeds)
        if parts is not None and all(np.isfinite(part).all() for part in parts):
            for total, part in zip(totals, parts, strict=True):
                np.add(total, part, out=total)
        elif len(x) > 1:
            half = len(x) // 2
            self._add_bounded(x[:half], y[:half], feeds, totals)
            self._add_bounded(x[half:], y[half:], feeds, totals)

    def _run(self, x: _Array, y: _Array, feeds: dict[str, _Array]) -> Sequence[_Array] | None:
        """Return the sums of 1 to `batch` rows by parameter; None if the engine fails on them."""
        batch = self._contract.batch
        mask = (np.arange(batch) < len(x)).astype(np.float32)
        rows = {"x": _padded(x, self._input, batch), "y": _padded(y, self._contract.target, batch), "mask": mask}
        try:
            *sums, _norms = self._engine.run({**rows, **feeds})
        except Exception:  # noqa: BLE001 - an engine's errors share no base; their text may quote a sample
            return None
        for part, shape in zip(sums, self._contract.layout.shapes, strict=True):
            if part.shape != shape:
                raise StalledError(f"the training step returned a sum of shape {part.shape}, expected {shape}")
        return sums

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


def _padded(rows: _Array, spec: TensorSpec, batch: int) -> _Array:
    """Return `rows` with copies of the first behind them: masked, and as finite as it is, whatever the model."""
    padded = np.empty((batch, *spec.row_shape), spec.dtype)
    padded[: len(rows)] = rows
    padded[len(rows) :] = rows[0]
    return padded
