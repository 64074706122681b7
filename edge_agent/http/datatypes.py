"""What the Open Inference Protocol calls the dtypes of `models.tensors.spec`; pure."""

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

BYTES: Final = "BYTES"
BF16: Final = "BF16"  # the upper half of FP32, and taken as such; NumPy has no dtype for it
BINARY_ONLY: Final = frozenset({"FP16", BF16})
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "FP16": np.dtype(np.float16),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
    BYTES: np.dtype(object),  # of str: text is all that a model here can take
}
DATATYPE_OF: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}
