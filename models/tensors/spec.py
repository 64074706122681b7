"""What a tensor at a model's door looks like."""

from dataclasses import dataclass
from typing import Any

import numpy as np

TRAINING_DTYPES = ("float32", "float64", "int8", "uint8", "int32", "int64", "bool")  # what a definition may take
DTYPES = (*TRAINING_DTYPES, "float16", "int16", "uint16", "uint32", "uint64", "string")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one input or output.

    Attributes:
        name: As callers and graphs name it.
        shape: Lengths of the axes; the first is "batch", any number of rows.
        dtype: One of `DTYPES`.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a tensor must have a name")
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not self.shape or self.shape[0] != "batch":
            raise ValueError(f"tensor {self.name!r}: shape {self.shape} must begin with 'batch'")
        if not all(isinstance(length, int) and length > 0 for length in self.shape[1:]):
            raise ValueError(f"tensor {self.name!r}: shape {self.shape}: axes after the first are integers > 0")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row, without the batch axis."""
        return tuple(length for length in self.shape[1:] if isinstance(length, int))

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """What arrays of this tensor have as dtype; `object`, which holds `str`, for strings."""
        return np.dtype(object if self.dtype == "string" else self.dtype)
