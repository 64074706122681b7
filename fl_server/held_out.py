"""The server's own data: what calibrates and measures versions, never a device's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fl_server.errors import UsageError
from models.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutData:
    """Inputs x, shape (n, ...), and targets y, shape (n, ...), n >= 1; y is None where a file holds only inputs."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any] | None


def load_held_out(path: Path, spec: TensorSpec) -> HeldOutData:
    """Return the npz at `path`, its x as the dtype of the model's input `spec`.

    Raises:
        UsageError: Unreadable, or not rows of the input's shape.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays.get("y")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, BadZipFile, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is no npz file of arrays x and y: {error}") from error
    if not len(x) or x.shape[1:] != spec.row_shape:
        raise UsageError(f"{path}: x has shape {x.shape}, input {spec.name!r} has shape {spec.shape}")
    if y is not None and len(y) != len(x):
        raise UsageError(f"{path}: {len(x)} rows of x but {len(y)} of y")
    return HeldOutData(x=x.astype(spec.dtype), y=y)
