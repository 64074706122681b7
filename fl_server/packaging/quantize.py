"""New parameters into the float graph, and the float graph into int8; needs no torch."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from fl_server.errors import DefinitionError
from fl_server.packaging.architecture import Quantization

_CALIBRATION_ROWS = 64  # in one run: bounds the memory that calibration takes


def load_graph(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write `graph` to `path`, weights inside."""
    path.write_bytes(graph.SerializeToString(deterministic=True))


def build_with_parameters(graph: onnx.ModelProto, parameters: Mapping[str, npt.NDArray[np.float32]]) -> onnx.ModelProto:
    """Return a copy of the float `graph` with `parameters` as its initializers.

    Raises:
        DefinitionError: A parameter has no initializer of its name and shape.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    initializers = {initializer.name: initializer for initializer in changed.graph.initializer}
    for name, array in parameters.items():
        if name not in initializers:
            raise DefinitionError(f"parameter {name!r} is not in the inference graph: the output does not depend on it")
        initializer = initializers[name]
        if tuple(initializer.dims) != array.shape:
            raise DefinitionError(
                f"parameter {name!r} has shape {array.shape}, the inference graph has {tuple(initializer.dims)}"
            )
        initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return changed


def quantize(graph: onnx.ModelProto, calibration: npt.NDArray[Any], quantization: Quantization, path: Path) -> None:
    """Write `graph` in int8 to `path`.

    Args:
        graph: Float graph with one input.
        calibration: Inputs, shape (n, ...), n >= 1, whose activations set the ranges; unused if "dynamic".
        quantization: "static": per-channel weights, activations between their extremes (MinMax).
        path: Where the file is written, weights inside.
    """
    if not len(calibration):
        raise ValueError("calibration needs at least one input")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantize.") as scratch:
        float_path, int8_path = Path(scratch, "float.onnx"), Path(scratch, "int8.onnx")
        save_graph(graph, float_path)
        if quantization == "dynamic":
            quantize_dynamic(float_path, int8_path, per_channel=True, weight_type=QuantType.QInt8)
        else:
            quantize_static(
                float_path,
                int8_path,
                _Batches(graph.graph.input[0].name, calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        save_graph(load_graph(int8_path), path)


class _Batches(CalibrationDataReader):  # type: ignore[misc] - onnxruntime ships no types
    def __init__(self, name: str, inputs: npt.NDArray[Any]) -> None:
        starts = range(0, len(inputs), _CALIBRATION_ROWS)
        self._feeds = iter([{name: inputs[start : start + _CALIBRATION_ROWS]} for start in starts])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self._feeds, None)
