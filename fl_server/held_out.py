"""The server's own data: what calibrates and measures versions, never a device's."""

import zlib
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
    """Inputs x, shape (n, ...), and targets y, shape (n, ...), n >= 1, finite; y is None where a file has only inputs."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any] | None


def load_held_out(path: Path, spec: TensorSpec) -> HeldOutData:
    """Return the npz at `path`, its x as the dtype of the model's input `spec`.

    Raises:
        UsageError: Unreadable, not rows of the input's shape, or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays.get("y")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, BadZipFile, zlib.error, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is no npz file of arrays x and y: {error}") from error
    if x.ndim != len(spec.shape) or not len(x) or x.shape[1:] != spec.row_shape:
        raise UsageError(f"{path}: x has shape {x.shape}, input {spec.name!r} has shape {spec.shape}")
    if y is not None and y.shape[:1] != x.shape[:1]:
        raise UsageError(f"{path}: x has {len(x)} rows, y has shape {y.shape}")
    try:
        x = x.astype(spec.dtype)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: x is {x.dtype}, input {spec.name!r} is {spec.dtype}") from error
    for name, array in (("x", x), ("y", y)):
        if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"{path}: {name} holds NaN or infinity")
    return HeldOutData(x=x, y=y)
