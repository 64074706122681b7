"""The server's own data: what calibrates and measures versions, never a device's."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fl_server.errors import UsageError
from models.tensors.features import Feature, RowError, build_inputs
from models.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutData:
    """Inputs x, shape (n, ...), and targets y, shape (n, ...), n >= 1, finite; y is None where a file has only inputs."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedData:
    """Inputs by name, each of n >= 1 rows, for a graph made elsewhere; y is None where a file has only inputs."""

    inputs: dict[str, npt.NDArray[Any]]
    y: npt.NDArray[Any] | None


def load_held_out(path: Path, spec: TensorSpec, features: Sequence[Feature] = ()) -> HeldOutData:
    """Return the npz at `path`, its x as the dtype of the model's input `spec`.

    Without x it holds an array for each column of raw rows, of which `features` make the input, as on a device.

    Raises:
        UsageError: Unreadable, not rows of the input's shape, of no use to the features, or not finite.
    """
    arrays = _load_arrays(path)
    if "x" not in arrays and features:
        arrays["x"] = _build_input(path, arrays, spec, features)
    if "x" not in arrays:
        raise UsageError(f"{path} holds no array x; arrays there: {', '.join(sorted(arrays)) or 'none'}")
    y = arrays.get("y")
    x = _convert(path, "x", arrays["x"], spec)
    _check_target(path, y, len(x))
    return HeldOutData(x=x, y=y)


def load_named_data(path: Path, specs: tuple[TensorSpec, ...]) -> NamedData:
    """Return the npz at `path`: an array for each input, by its name, or x for the only one; and y, if it is there.

    Raises:
        UsageError: As `load_held_out`, for every input.
    """
    arrays = _load_arrays(path)
    names = {spec.name: spec.name if spec.name in arrays or len(specs) > 1 else "x" for spec in specs}
    if missing := set(names.values()) - set(arrays):
        raise UsageError(f"{path} holds no array {min(missing)!r}; arrays there: {', '.join(sorted(arrays)) or 'none'}")
    inputs = {spec.name: _convert(path, names[spec.name], arrays[names[spec.name]], spec) for spec in specs}
    rows = {name: len(array) for name, array in inputs.items()}
    if len(set(rows.values())) != 1:
        raise UsageError(f"{path}: arrays differ in their number of rows: {rows}")
    y = arrays.get("y")
    _check_target(path, y, next(iter(rows.values())))
    return NamedData(inputs=inputs, y=y)


def _build_input(
    path: Path, columns: Mapping[str, npt.NDArray[Any]], spec: TensorSpec, features: Sequence[Feature]
) -> npt.NDArray[Any]:
    names = [name for name in dict.fromkeys(feature.column for feature in features) if name in columns]
    lengths = {name: columns[name].shape for name in names}
    if len(set(lengths.values())) != 1 or len(next(iter(lengths.values()))) != 1:
        raise UsageError(f"{path}: expected x, or columns of one length for the model's features, got {lengths}")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(columns[name].tolist() for name in names), strict=True)]
    try:
        return build_inputs(features, (spec,), rows)[spec.name]
    except RowError as error:
        raise UsageError(f"{path}: {error}") from error


def _load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, BadZipFile, zlib.error, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is no npz file of arrays: {error}") from error


def _convert(path: Path, name: str, array: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[Any]:
    if array.ndim != len(spec.shape) or not len(array) or array.shape[1:] != spec.row_shape:
        raise UsageError(f"{path}: {name} has shape {array.shape}, input {spec.name!r} has shape {spec.shape}")
    try:
        converted = array.astype(str).astype(object) if spec.dtype == "string" else array.astype(spec.dtype)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: {name} is {array.dtype}, input {spec.name!r} is {spec.dtype}") from error
    _check_finite(path, name, converted)
    return converted


def _check_target(path: Path, y: npt.NDArray[Any] | None, rows: int) -> None:
    if y is None:
        return
    if y.shape[:1] != (rows,):
        raise UsageError(f"{path}: x has {rows} rows, y has shape {y.shape}")
    _check_finite(path, "y", y)


def _check_finite(path: Path, name: str, array: npt.NDArray[Any]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"{path}: {name} holds NaN or infinity")
