"""The float inference graph in int8; needs no torch."""

import tempfile
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from fl_server.packaging.architecture import Quantization
from fl_server.packaging.graphs import fold_transposes, load_graph, save_graph

_CALIBRATION_ROWS = 64  # in one run: bounds the memory that calibration takes
# Weights of seven bits: on x86 without VNNI two products of eight bits overflow the 16 that they are summed in, and
# onnxruntime lets them saturate. The digits strayed by 0.116 of their spread there, and by 0.020 with seven bits.
_SEVEN_BITS = True
SEVEN_BITS_MAX = 64  # -64 to 64, as onnxruntime counts seven bits


def prepare_graph(graph: onnx.ModelProto, quantization: Quantization) -> onnx.ModelProto:
    """Return a copy of the float `graph` in which each weight is an initializer of the shape that int8 keeps."""
    prepared = onnx.ModelProto()
    prepared.CopyFrom(graph)
    fold_transposes(prepared)
    if quantization == "dynamic":
        ONNXModel(prepared).replace_gemm_with_matmul()
    return prepared


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
        prepared = prepare_graph(graph, quantization)
        add_pre_process_metadata(prepared)  # the exporter did what onnxruntime would ask for on the root logger
        save_graph(prepared, float_path)
        if quantization == "dynamic":
            quantize_dynamic(
                float_path, int8_path, per_channel=True, weight_type=QuantType.QInt8, reduce_range=_SEVEN_BITS
            )
        else:
            quantize_static(
                float_path,
                int8_path,
                _Batches(graph.graph.input[0].name, calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                reduce_range=_SEVEN_BITS,
                calibrate_method=CalibrationMethod.MinMax,
            )
        save_graph(load_graph(int8_path), path)


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, name: str, inputs: npt.NDArray[Any]) -> None:
        starts = range(0, len(inputs), _CALIBRATION_ROWS)
        self._feeds = iter([{name: inputs[start : start + _CALIBRATION_ROWS]} for start in starts])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self._feeds, None)
