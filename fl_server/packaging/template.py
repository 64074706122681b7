"""Int8 graphs as a template and its weights, so that later versions of an architecture change only the weights.

    int8 graph = inference.onnx, the template: nodes, scales, zero points, shapes; the same file in many versions
               + weights.bin: what depends on the parameters, at places that the template fixes

The champion's template is kept while the new parameters fit its scales; `explain_renewal` is that rule.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from fl_server.inference import ROWS
from fl_server.packaging.quantize import SEVEN_BITS_MAX
from models.contract.manifest import WEIGHTS_NAME

CLIPPED_MAX = 0.02  # of the weights, and of any one activation's values

Array = npt.NDArray[Any]

_QUANTIZED, _SCALE, _ZERO_POINT, _INPUT = "_quantized", "_scale", "_zero_point", "_QuantizeLinear_Input"
_SUMMING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # of int8 products, where seven bits are needed


class MisfitError(ValueError):
    """The template is one of another graph."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Code:
    """How integers stand for a float tensor: value = scale * (integer - zero_point), lowest <= integer <= highest."""

    scale: Array
    zero_point: Array
    lowest: int
    highest: int


def explain_renewal(*, weight_clipping: float, activation_clipping: float, deviation: float, tolerance: float) -> str:
    """Return why new parameters need scales of their own; "" if the template is kept. Pure.

    Args:
        weight_clipping: Share of the weights beyond their scales.
        activation_clipping: Largest share of one activation's values beyond its scale, on the calibration data.
        deviation: Of the outputs, as `compute_deviation` has it.
        tolerance: Of `deviation`.
    """
    for what, share in (("the weights", weight_clipping), ("an activation", activation_clipping)):
        if not share <= CLIPPED_MAX:
            return f"{share:.1%} of {what} lie beyond the champion's scales, {CLIPPED_MAX:.0%} may"
    if not deviation <= tolerance:  # NaN strays too
        return f"with the champion's scales the outputs stray by {deviation:.3f} of their spread, tolerated are {tolerance:g}"
    return ""


def split_weights(graph: onnx.ModelProto, prepared: onnx.ModelProto) -> tuple[onnx.ModelProto, bytes]:
    """Return the template of an int8 `graph`, and its weights.

    Args:
        graph: As `quantize` made it of:
        prepared: The float graph, as `prepare_graph` returns it.
    """
    floats = _list_floats(prepared)
    outside = [tensor for tensor in graph.graph.initializer if _find_source(tensor, floats) is not None]
    template, weights = onnx.ModelProto(), bytearray()
    template.CopyFrom(graph)
    places = {tensor.name: tensor for tensor in template.graph.initializer}
    for tensor in sorted(outside, key=lambda tensor: -_get_dtype(tensor).itemsize):  # each at a multiple of its size
        data = numpy_helper.to_array(tensor).tobytes()
        place = places[tensor.name]
        place.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
        place.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_NAME), ("offset", len(weights)), ("length", len(data))):
            place.external_data.add(key=key, value=str(value))
        weights += data
    return template, bytes(weights)


def build_weights(template: onnx.ModelProto, prepared: onnx.ModelProto) -> tuple[bytes, float]:
    """Return the weights of the float graph `prepared` as `template` lays them out, and how many it clips.

    Returns:
        The weights, and the share of the quantized ones that lie beyond their scales.

    Raises:
        MisfitError: The template is not one of this graph's.
    """
    floats, codes = _list_floats(prepared), dict(_list_codes(template))
    constants = {tensor.name: tensor for tensor in prepared.graph.initializer}
    parts, clipped, quantized = dict[int, bytes](), 0, 0
    for tensor in template.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            same = constants.get(tensor.name, tensor)
            if not np.array_equal(numpy_helper.to_array(same), numpy_helper.to_array(tensor)):
                raise MisfitError(f"{tensor.name!r} is another constant")
            continue
        source = _find_source(tensor, floats)
        if source is None or floats[source].shape != tuple(tensor.dims):
            raise MisfitError(f"{tensor.name!r} has no float tensor of its shape")
        array = floats[source]
        if tensor.name != source:
            array, beyond = _encode(array, codes[tensor.name], _get_dtype(tensor))
            clipped, quantized = clipped + beyond, quantized + array.size
        parts[int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))] = array.tobytes()
    return b"".join(parts[offset] for offset in sorted(parts)), clipped / max(quantized, 1)


def measure_activation_clipping(template: onnx.ModelProto, prepared: onnx.ModelProto, calibration: Array) -> float:
    """Return the largest share of an activation's values that lie beyond the template's scale for it.

    Args:
        template: Static or dynamic; a dynamic one scales activations as they come and clips none.
        prepared: The float graph, with one input.
        calibration: Inputs, shape (n, ...), n >= 1.

    Raises:
        MisfitError: The template is not one of this graph's.
    """
    ranges = dict(_list_ranges(template))
    graph = onnx.ModelProto()
    graph.CopyFrom(prepared)
    inputs, outputs = [value.name for value in graph.graph.input], [value.name for value in graph.graph.output]
    made = {name for node in graph.graph.node for name in node.output}
    if missing := ranges.keys() - made - set(inputs):
        raise MisfitError(f"the graph makes no {min(missing)!r}")
    graph.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in sorted(made & ranges.keys() - set(outputs))
    )
    session = ort.InferenceSession(graph.SerializeToString(), _build_options(), providers=["CPUExecutionProvider"])
    clipped, sizes = dict.fromkeys(ranges, 0), dict.fromkeys(ranges, 0)
    names = [value.name for value in session.get_outputs()]
    for start in range(0, len(calibration), ROWS):
        rows = calibration[start : start + ROWS]
        values = {inputs[0]: rows} | dict(zip(names, session.run(names, {inputs[0]: rows}), strict=True))
        for name, (low, high) in ranges.items():
            clipped[name] += int(np.count_nonzero((values[name] < low) | (values[name] > high)))
            sizes[name] += values[name].size
    return max((clipped[name] / sizes[name] for name in ranges), default=0.0)


def _list_floats(graph: onnx.ModelProto) -> dict[str, Array]:
    kept = (tensor for tensor in graph.graph.initializer if tensor.data_type == TensorProto.FLOAT)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in kept}


def _find_source(tensor: TensorProto, floats: Mapping[str, Array]) -> str | None:
    """Return the float tensor that `tensor`, of an int8 graph, stands for; None if it belongs to the template.

    A scalar in float is a constant that nodes are optimized by.
    """
    if tensor.name in floats:
        return tensor.name if tensor.dims else None
    source = tensor.name.removesuffix(_QUANTIZED)
    return source if source in floats else None


def _list_codes(template: onnx.ModelProto) -> Iterator[tuple[str, _Code]]:
    """Yield the code of every quantized initializer, by name."""
    tensors = {tensor.name: tensor for tensor in template.graph.initializer}
    readers = {name: node for node in template.graph.node for name in node.input}
    for name, tensor in tensors.items():
        if not name.endswith(_QUANTIZED):
            continue
        base = name if name + _SCALE in tensors else name.removesuffix(_QUANTIZED)
        if base + _SCALE not in tensors or base + _ZERO_POINT not in tensors or name not in readers:
            raise MisfitError(f"{name!r} has no scale of its own")
        reader = readers[name]
        axis, is_factor = -1, reader.op_type == "MatMulInteger"
        if reader.op_type == "DequantizeLinear":
            axis = next((attribute.i for attribute in reader.attribute if attribute.name == "axis"), 1)
            is_factor = readers[reader.output[0]].op_type in _SUMMING if reader.output[0] in readers else False
        elif reader.op_type == "ConvInteger":
            axis, is_factor = 0, True
        scale, zero_point = (
            _align(numpy_helper.to_array(tensors[base + suffix]), axis, len(tensor.dims))
            for suffix in (_SCALE, _ZERO_POINT)
        )
        limits = np.iinfo(_get_dtype(tensor))
        is_seven = is_factor and limits.dtype == np.int8
        yield (
            name,
            _Code(
                scale=scale,
                zero_point=zero_point,
                lowest=-SEVEN_BITS_MAX if is_seven else limits.min,
                highest=SEVEN_BITS_MAX if is_seven else limits.max,
            ),
        )


def _list_ranges(template: onnx.ModelProto) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the least and the greatest value that each quantized activation can take, by the float graph's names."""
    tensors = {tensor.name: tensor for tensor in template.graph.initializer}
    for node in template.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        activation, scale_name, zero_point_name = node.input
        if not {scale_name, zero_point_name} <= tensors.keys():
            raise MisfitError(f"{activation!r} is quantized by scales that are none of the template's constants")
        scale, zero_point = (
            numpy_helper.to_array(tensors[name]).astype(np.float64) for name in (scale_name, zero_point_name)
        )
        limits = np.iinfo(_get_dtype(tensors[zero_point_name]))
        # Half a step beyond the last one is rounded, not clipped.
        low, high = (scale * (limits.min - 0.5 - zero_point), scale * (limits.max + 0.5 - zero_point))
        yield activation.removesuffix(_INPUT), (float(low), float(high))


def _encode(array: Array, code: _Code, dtype: np.dtype[Any]) -> tuple[Array, int]:
    """Return `array` in integers, and how many of its values were clipped."""
    steps = (array.astype(np.float64 if dtype == np.int32 else np.float32) / code.scale).round() + code.zero_point
    clipped = int(np.count_nonzero((steps < code.lowest) | (steps > code.highest)))
    return np.clip(steps, code.lowest, code.highest).astype(dtype), clipped


def _align(values: Array, axis: int, rank: int) -> Array:
    """Return one value a channel in the shape that broadcasts along `axis` of a tensor of `rank`."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _get_dtype(tensor: TensorProto) -> np.dtype[Any]:
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return dtype


def _build_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    return options
