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
from edge_agent.training.noise import GRID_SLACK, add_on_grid, build_grid
from edge_agent.training.optimizers import build_optimizer
from edge_agent.training.sensitivity import ROWS, TOLERANCE, check_sensitivity, random_rows
from models.contract.encoding import build_digest
from models.contract.manifest import TRAIN_STEP_NAME, ModelManifest
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Vector

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
        self._bind()
        self._check_clips(np.random.default_rng())

    def clipped_sum(self, x: _Array, y: _Array, clipping_norm: float, parameters: Vector) -> _Floats:
        """Return the sum of the samples' clipped gradients, of any number of rows, flat, float64."""
        total, batch = np.zeros(self.size), len(self._mask)
        self._clipping_norm[...] = clipping_norm
        np.copyto(self._parameters, parameters)
        for start in range(0, len(x), batch):
            self._add_bounded(x[start : start + batch], y[start : start + batch], total)
        return total

    def _add_bounded(self, x: _Array, y: _Array, total: _Floats) -> None:
        """Add the sum of one batch, in which a sample that the graph cannot take adds nothing.

        A gradient that is not finite, or a label out of range, must neither spoil nor mark the sum of the
        others: it is looked for by halves.
        """
        if self._run(x, y) and np.isfinite(self._sums).all():
            np.copyto(self._exact_sums, self._sums)
            np.add(total, self._exact_sums, out=total)
        elif len(x) > 1:
            half = len(x) // 2
            self._add_bounded(x[:half], y[:half], total)
            self._add_bounded(x[half:], y[half:], total)

    def _run(self, x: _Array, y: _Array) -> bool:
        """Let the graph write the sums of 1 to a batch of rows; return whether it could take them."""
        for bound, rows in ((self._x, x), (self._y, y)):
            bound[: len(rows)] = rows
            bound[len(rows) :] = rows[0]  # masked, and as finite as the first, whatever the model
        self._mask[: len(x)], self._mask[len(x) :] = 1, 0
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception:  # noqa: BLE001 - onnxruntime's errors share no base; their text may quote a sample
            return False
        return True

    def _bind(self) -> None:
        """Let the graph read from and write to arrays that are kept: each step would else map new ones."""
        contract, batch = self._contract, self._contract.batch
        self._x = np.zeros((batch, *self._input.row_shape), self._input.dtype)
        self._y = np.zeros((batch, *contract.target.row_shape), contract.target.dtype)
        self._mask, self._clipping_norm = np.zeros(batch, np.float32), np.zeros((), np.float32)
        self._parameters, self._sums, self._norms = (np.zeros(n, np.float32) for n in (self.size, self.size, batch))
        self._exact_sums = np.zeros(self.size)
        arrays = {"x": self._x, "y": self._y, "mask": self._mask, "clipping_norm": self._clipping_norm}
        arrays |= contract.layout.unflatten(self._parameters)
        sums = (*contract.layout.unflatten(self._sums).values(), self._norms)
        self._binding = self._session.io_binding()
        for name, array in arrays.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for node, array in zip(self._session.get_outputs(), sums, strict=True):
            self._binding.bind_output(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _check_ends(self) -> None:
        expected = ["x", "y", "mask", "clipping_norm", *self._contract.layout.names]
        found = [node.name for node in self._session.get_inputs()]
        if found != expected:
            raise StalledError(f"{TRAIN_STEP_NAME} has inputs {found}, expected {expected}")
        outputs, layout = self._session.get_outputs(), self._contract.layout
        if len(outputs) != len(layout.names) + 1:
            raise StalledError(f"{TRAIN_STEP_NAME} has {len(outputs)} outputs, expected one a parameter, and the norms")
        for node, shape in zip(outputs, (*layout.shapes, (self._contract.batch,)), strict=True):
            is_fixed = all(isinstance(length, int) for length in node.shape)  # of another, onnxruntime refuses the run
            if node.type != "tensor(float)" or (is_fixed and node.shape != list(shape)):
                raise StalledError(
                    f"{TRAIN_STEP_NAME} returns {node.name} as {node.type} of shape {node.shape}, expected "
                    f"tensor(float) of shape {list(shape)}"
                )

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


def check_supported(privacy: PrivacyPlan) -> None:
    """Raise StalledError unless this device can train under `privacy`."""
    if privacy.unit is not Unit.SAMPLE:
        raise StalledError(f"privacy unit {privacy.unit.value!r} is not supported, only {Unit.SAMPLE.value!r}")


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
        StalledError: The unit is not `sample`, or the graph fails.
    """
    check_supported(privacy)
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
