"""What virtual devices hold and what is measured: two folders, of one npz of x and y a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from fl_server.errors import UsageError
from fl_server.evaluation.metrics import Array
from fl_server.held_out import load_held_out
from models.contract.privacy import PrivacyPlan, Unit
from models.contract.topics import check_name
from models.definitions import ModelDefinition
from models.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """One file: x, shape (n, ...), as the model's input; y, shape (n, ...), as its loss takes it; n >= 1."""

    path: Path
    x: Array
    y: Array


def load_samples(directory: Path, definition: ModelDefinition, target: TensorSpec) -> dict[str, Samples]:
    """Return the samples in `directory` by the name of their file, which names the device, in its order.

    Raises:
        UsageError: No npz file is there, or one does not hold what the definition takes.
    """
    paths = sorted(directory.glob("*.npz"))
    if not paths:
        raise UsageError(f"{directory} holds no .npz file; expected one of x and y for each device")
    return {_name(path): _load(path, definition, target) for path in paths}


def check_plan(privacy: PrivacyPlan, *, expected_batch: Decimal, sizes: Sequence[int]) -> None:
    """Raise UsageError where a plan promises nothing, or cannot be carried out with so many samples on each device."""
    is_device = privacy.unit is Unit.DEVICE
    units, what = (len(sizes), "devices") if is_device else (max(sizes), "samples of the device that has most")
    if privacy.delta * units > 1:
        raise UsageError(
            f"--delta is {privacy.delta}, above 1/{units}, one by the number of {what}: that would allow to publish "
            f"one of them as it is"
        )
    if expected_batch > max(sizes):
        raise UsageError(
            f"--expected-batch is {expected_batch}, larger than the data: the device that has most holds {max(sizes)} "
            "samples"
        )


def _name(path: Path) -> str:
    try:
        return check_name(path.stem, "device id")
    except ValueError as error:
        raise UsageError(f"{path}: the file names its device: {error}") from error


def _load(path: Path, definition: ModelDefinition, target: TensorSpec) -> Samples:
    data = load_held_out(path, definition.inputs[0])
    if data.y is None:
        raise UsageError(f"{path} holds no array y; expected {target.dtype} of shape {target.shape}")
    y = data.y
    if y.size != len(data.x) * int(np.prod(target.row_shape)):
        raise UsageError(f"{path}: y has shape {y.shape}, the loss takes shape {target.shape}")
    converted = y.astype(target.dtype).reshape(len(y), *target.row_shape)
    if target.dtype == "int64":
        classes = definition.outputs[0].row_shape[0]
        if (
            not np.array_equal(converted, y.reshape(converted.shape))
            or converted.min() < 0
            or converted.max() >= classes
        ):
            raise UsageError(f"{path}: y must hold classes, whole numbers from 0 to {classes - 1}")
    return Samples(path=path, x=data.x, y=converted)
