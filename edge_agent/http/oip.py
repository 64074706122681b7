"""Open Inference Protocol v2 in JSON: requests to arrays and arrays to responses; pure.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.errors import RequestError
from models.contract.manifest import ModelManifest
from models.tensors.spec import TensorSpec

Array: TypeAlias = npt.NDArray[Any]

SERVER_NAME = "edge-agent"
AXES_MAX = 16  # NumPy 1 takes 32 axes; no model here has more than 5
_PLATFORMS = {"onnx": "onnxruntime_onnx", "tflite": "litert_tflite"}
_DATATYPES = {  # to DTYPES of models.tensors.spec
    "FP32": "float32",
    "FP64": "float64",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_DTYPES = {datatype: np.dtype(dtype) for datatype, dtype in _DATATYPES.items()}
_DATATYPE_OF = {dtype: datatype for datatype, dtype in _DTYPES.items()}
_LIMITS = {
    dtype: (float(np.finfo(dtype).min), float(np.finfo(dtype).max))
    if dtype.kind == "f"
    else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    for dtype in _DTYPES.values()
    if dtype.kind != "b"
}
_ELEMENTS: dict[str, type] = {"f": list[float], "i": list[int], "u": list[int], "b": list[bool]}  # by NumPy's kind


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw


class _Output(msgspec.Struct):
    name: str


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    outputs: list[_Output] = []


class _OutputTensor(msgspec.Struct):
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: list[Any]


class _Response(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_OutputTensor]
    id: str = ""
    parameters: dict[str, str] = {}


_REQUEST_DECODER = msgspec.json.Decoder(_Request)
_DATA_DECODERS: dict[str, msgspec.json.Decoder[list[Any]]] = {
    kind: msgspec.json.Decoder(elements) for kind, elements in _ELEMENTS.items()
}
_ENCODER = msgspec.json.Encoder()
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a caller asked.

    Attributes:
        id: The caller's own, given back.
        inputs: By name.
        outputs: Names of the outputs wanted; all of them if empty.
    """

    id: str
    inputs: dict[str, Array]
    outputs: tuple[str, ...]


def parse_infer_request(body: bytes) -> InferRequest:
    """Return the request in `body`; whether it fits a model is the engine's to say.

    Raises:
        RequestError: Not JSON, not an inference request, or data that are not what they are said to be.
    """
    try:
        request = _REQUEST_DECODER.decode(body)
    except _DECODE_ERRORS as error:
        raise RequestError(
            f'expected {{"inputs": [{{"name", "shape", "datatype", "data"}}]}} as JSON in UTF-8: {error}'
        ) from error
    inputs = {tensor.name: _parse_tensor(tensor) for tensor in request.inputs}
    if len(inputs) != len(request.inputs):
        raise RequestError("expected each input once, got a name twice")
    return InferRequest(request.id, inputs, tuple(output.name for output in request.outputs))


def build_infer_response(
    manifest: ModelManifest, request: InferRequest, outputs: Mapping[str, Array], feedback_id: str = ""
) -> bytes:
    """Return the answer to `request`; a value that JSON cannot say (NaN, infinity) is null.

    Args:
        manifest: Of the version that answered.
        request: What was asked.
        outputs: By name.
        feedback_id: The server's own id; it is the answer's, or a parameter beside the caller's.

    Raises:
        RequestError: An output was asked for that the model does not have.
    """
    names = request.outputs or tuple(spec.name for spec in manifest.outputs)
    if unknown := [name for name in names if name not in outputs]:
        raise RequestError(f"output {unknown[0]!r:.80}: expected one of {', '.join(map(repr, outputs))}")
    tensors = [_build_tensor(name, outputs[name]) for name in names]
    response = _Response(manifest.model, str(manifest.version), tensors, request.id or feedback_id)
    if feedback_id and request.id:
        response.parameters = {"feedback_id": feedback_id}
    return _ENCODER.encode(response)


def build_tensors(inputs: Mapping[str, Array]) -> bytes:
    """Return `inputs` as a request has them, in a document of their own."""
    return _ENCODER.encode({"inputs": [_build_tensor(name, array) for name, array in inputs.items()]})


def build_server_metadata(version: str) -> bytes:
    return _ENCODER.encode({"name": SERVER_NAME, "version": version, "extensions": []})


def build_model_metadata(manifest: ModelManifest, versions: Sequence[int]) -> bytes:
    """Return name, version and tensors of the model; its labels and the columns of its raw rows, if any, as parameters."""
    document: dict[str, object] = {
        "name": manifest.model,
        "versions": [str(version) for version in versions],
        "platform": _PLATFORMS[manifest.runtime],
        "inputs": _describe(manifest.inputs),
        "outputs": _describe(manifest.outputs),
    }
    parameters = {"labels": manifest.labels, "columns": [feature.column for feature in manifest.features]}
    if said := {name: values for name, values in parameters.items() if values}:
        document["parameters"] = said
    return _ENCODER.encode(document)


def _parse_tensor(tensor: _Input) -> Array:
    name = f"input {tensor.name!r:.80}"
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        raise RequestError(f"{name}: expected a datatype of {', '.join(_DATATYPES)}, got {tensor.datatype!r:.80}")
    shape = tensor.shape
    if not 1 <= len(shape) <= AXES_MAX or min(shape) < 1:
        raise RequestError(f"{name}: expected a shape of 1 to {AXES_MAX} lengths >= 1, got {shape!s:.80}")
    try:
        values = _parse_values(tensor.data, dtype.kind)
    except _DECODE_ERRORS as error:
        raise RequestError(f"{name}: data must be a list of {tensor.datatype} numbers: {error}") from error
    if len(values) != math.prod(shape):
        raise RequestError(f"{name}: shape {shape} has {math.prod(shape)} values, data has {len(values)}")
    return _to_array(values, dtype, name).reshape(shape)


def _parse_values(data: msgspec.Raw, kind: str) -> list[Any]:
    """Return the values of a flat list, or of nested lists in row-major order."""
    try:
        return _DATA_DECODERS[kind].decode(data)
    except msgspec.ValidationError:
        values = msgspec.json.decode(data)
        if not (isinstance(values, list) and values and isinstance(values[0], list)):
            raise
    while values and all(isinstance(value, list) for value in values):
        values = list(chain.from_iterable(values))
    return msgspec.convert(values, _ELEMENTS[kind])


def _to_array(values: list[Any], dtype: np.dtype[Any], name: str) -> Array:
    if dtype.kind == "b":
        return np.array(values, dtype)
    try:
        wide = np.array(values, np.float64 if dtype.kind == "f" else np.int64)
    except OverflowError as error:
        raise RequestError(f"{name}: a value is beyond 64 bits") from error
    least, largest = _LIMITS[dtype]
    if wide.min() < least or wide.max() > largest:
        raise RequestError(f"{name}: a value is beyond {_DATATYPE_OF[dtype]} [{least}, {largest}]")
    return wide.astype(dtype)


def _build_tensor(name: str, array: Array) -> _OutputTensor:
    return _OutputTensor(name, array.shape, _DATATYPE_OF[array.dtype], array.ravel().tolist())


def _describe(specs: Iterable[TensorSpec]) -> list[dict[str, object]]:
    return [
        {"name": spec.name, "datatype": _DATATYPE_OF[spec.numpy_dtype], "shape": [-1, *spec.row_shape]}
        for spec in specs
    ]
