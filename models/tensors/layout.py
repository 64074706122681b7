"""Parameters as one flat float32 vector: the order in which names and shapes follow each other."""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]
_Float = TypeVar("_Float", bound=np.floating[Any])


def build_vector_bytes(vector: Vector) -> bytes:
    """Return `vector` as it travels: little-endian float32, 4 bytes a value."""
    return vector.astype("<f4", copy=False).tobytes()


def parse_vector_bytes(data: bytes) -> Vector:
    """Return the vector in `data`, read only; raises ValueError if that is no whole number of values."""
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names and shapes of an architecture's parameters, in the order of the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise ValueError("a layout needs one shape a name, and each name once")
        if any(length < 1 for shape in self.shapes for length in shape):
            raise ValueError("a layout's shapes hold lengths >= 1")

    @property
    def size(self) -> int:
        """Number of values in the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def select(self, names: Container[str]) -> "Layout":
        """Return the layout of these parameters alone, in the order of this one."""
        kept = [pair for pair in zip(self.names, self.shapes, strict=True) if pair[0] in names]
        return Layout(names=tuple(name for name, _ in kept), shapes=tuple(shape for _, shape in kept))

    def mark(self, names: Container[str]) -> npt.NDArray[np.bool_]:
        """Return which values of the flat vector are of these parameters, shape (size,)."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return np.repeat([name in names for name in self.names], sizes)

    def flatten(self, arrays: Mapping[str, npt.NDArray[np.float32]]) -> Vector:
        """Return `arrays` as one vector, shape (size,), float32.

        Raises:
            ValueError: Names or shapes are not this layout's.
        """
        if set(arrays) != set(self.names):
            raise ValueError(f"parameters {sorted(arrays)} are not {sorted(self.names)}")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if arrays[name].shape != shape:
                raise ValueError(f"parameter {name!r} has shape {arrays[name].shape}, expected {shape}")
        return np.concatenate([np.asarray(arrays[name], np.float32).ravel() for name in self.names])

    def unflatten(self, vector: npt.NDArray[_Float]) -> dict[str, npt.NDArray[_Float]]:
        """Return views of `vector`, shape (size,), by name; writing to one writes to the vector."""
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {vector.shape}, expected ({self.size},)")
        arrays, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = start + math.prod(shape)
            arrays[name] = vector[start:end].reshape(shape)
            start = end
        return arrays
