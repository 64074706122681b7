"""Private training on one device: DP-SGD around the signed step graph.

The graph clips each sample's gradient and sums; what is here draws the batch, adds the noise, and steps.
Nothing that depends on a sample is counted or divided by before the noise is on it.

The noise stands for a little more than the clipping norm: for what a sample may exceed it by through float32 rounding
in the graph's norms and sums, which the check on load allows as well, and through rounding to the noise's grid.

Source:
    Abadi et al. 2016, "Deep Learning with Differential Privacy", arXiv:1607.00133, Algorithm 1, with
    Poisson sampling and the plan's expected batch as the denominator.
"""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_agent.errors import StalledError
from edge_agent.training.optimizers import build_optimizer
from edge_agent.training.sensitivity import ROWS, TOLERANCE, check_sensitivity, random_rows
from models.contract.encoding import build_digest
from models.contract.manifest import TRAIN_STEP_NAME, ModelManifest
from models.contract.privacy import PrivacyPlan, TrainingPlan
from models.tensors.layout import Vector
from models.tensors.noise import GRID_SLACK, add_on_grid, build_grid
from models.tensors.spec import TensorSpec

_Floats: TypeAlias = npt.NDArray[np.float64]
_Array: TypeAlias = npt.NDArray[Any]

Noise: TypeAlias = Callable[[int, float], _Floats]  # count, standard deviation -> shape (count,)
Sampler: TypeAlias = Callable[[int, Decimal], npt.NDArray[np.bool_]]  # count, rate -> shape (count,)

_SENSITIVITY = 1 + TOLERANCE + GRID_SLACK  # of a step's sum to one sample at most, in clipping norms


class StepGraph:
    """An open train step graph that was seen to clip.

    Attributes:
        size: Number of parameters.
    """

    def __init__(self, graph: bytes, manifest: ModelManifest) -> None:
        """Open `graph` as `manifest` describes it, and measure its sensitivity on random data.

        Raises:
            StalledError: No graph of this manifest, or it does not bound what a sample adds.
        """
        if manifest.training is None:
            raise StalledError(f"version {manifest.version} of {manifest.model!r} cannot be trained")
        self._contract = manifest.training
        self._input = manifest.training_input
        self.size = self._contract.layout.size
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # serving keeps the other cores
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # fatal only: its errors quote sample values
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no narrower base
            raise StalledError(f"{TRAIN_STEP_NAME} does not open: {f'{error}'.splitlines()[0]:.300}") from error
        self._check_ends()
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
        """Add the sum of one batch, in which a sample that the graph cannot take adds nothing.

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

    def _run(self, x: _Array, y: _Array, feeds: dict[str, _Array]) -> list[_Array] | None:
        """Return the sums of 1 to `batch` rows by parameter; None if the graph fails on them."""
        batch = self._contract.batch
        mask = (np.arange(batch) < len(x)).astype(np.float32)
        rows = {"x": _padded(x, self._input, batch), "y": _padded(y, self._contract.target, batch), "mask": mask}
        try:
            sums: list[_Array] = self._session.run(None, {**rows, **feeds})[:-1]  # without the norms
        except Exception:  # noqa: BLE001 - onnxruntime's errors share no base; their text may quote a sample
            return None
        for part, shape in zip(sums, self._contract.layout.shapes, strict=True):
            if part.shape != shape:
                raise StalledError(f"{TRAIN_STEP_NAME} returned a sum of shape {part.shape}, expected {shape}")
        return sums

    def _check_ends(self) -> None:
        expected = ["x", "y", "mask", "clipping_norm", *self._contract.layout.names]
        found = [node.name for node in self._session.get_inputs()]
        if found != expected:
            raise StalledError(f"{TRAIN_STEP_NAME} has inputs {found}, expected {expected}")
        outputs = len(self._session.get_outputs())
        if outputs != len(self._contract.layout.names) + 1:
            raise StalledError(f"{TRAIN_STEP_NAME} has {outputs} outputs, expected one a parameter, and the norms")

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


def open_step_graph(directory: Path, manifest: ModelManifest) -> StepGraph:
    """Return the step graph in `directory`, if it is the one that `manifest` names.

    Raises:
        StalledError: The file is missing, another, or unfit.
    """
    entry = manifest.files.get(TRAIN_STEP_NAME)
    if entry is None:
        raise StalledError(f"version {manifest.version} of {manifest.model!r} has no {TRAIN_STEP_NAME}")
    path = directory / TRAIN_STEP_NAME
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror or error}") from error
    if (digest := build_digest(graph)) != entry.digest:
        raise StalledError(f"{path} has digest {digest}, expected {entry.digest}")
    return StepGraph(graph, manifest)


def local_training(
    step: StepGraph,
    x: _Array,
    y: _Array,
    parameters: Vector,
    privacy: PrivacyPlan,
    training: TrainingPlan,
    noise: Noise,
    sampler: Sampler,
) -> Vector:
    """Return the update of one round of DP-SGD, shape (n,), float32.

    Args:
        step: The step graph.
        x: All samples, first axis the sample; may be empty.
        y: Their targets.
        parameters: Where to start, shape (n,). Not modified.
        privacy: Of unit sample.
        training: Steps, expected batch, optimiser.
        noise: Draws the noise, into an array of its own.
        sampler: Draws who takes part in a step.

    Raises:
        StalledError: The graph fails.
    """
    clipping_norm = float(privacy.clipping_norm)
    standard_deviation = float(privacy.noise_multiplier) * clipping_norm * _SENSITIVITY
    grid = build_grid(step.size, clipping_norm)
    optimizer = build_optimizer(training, step.size)
    pull = np.float32(training.proximal_mu * training.expected_batch)
    moved, current, noised = np.zeros_like(parameters), parameters.copy(), np.empty_like(parameters)
    for _ in range(training.steps):
        drawn = np.flatnonzero(sampler(len(x), privacy.sampling_rate))
        total = step.clipped_sum(x[drawn], y[drawn], clipping_norm, current)
        add_on_grid(total, noise(step.size, standard_deviation), grid)
        np.copyto(noised, total, casting="same_kind")
        if pull:
            np.add(noised, pull * moved, out=noised)
        optimizer(noised)
        np.subtract(moved, noised, out=moved)
        np.add(parameters, moved, out=current)
    return moved


def _padded(rows: _Array, spec: TensorSpec, batch: int) -> _Array:
    """Return `rows` with copies of the first behind them: masked, and as finite as it is, whatever the model."""
    padded = np.empty((batch, *spec.row_shape), spec.dtype)
    padded[: len(rows)] = rows
    padded[len(rows) :] = rows[0]
    return padded
