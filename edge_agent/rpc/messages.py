"""The protocol's messages, and requests to arrays and arrays to responses; pure."""

from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from google.protobuf.message import DecodeError

from edge_agent.errors import RequestError
from edge_agent.http.binary import STRINGS_MAX, build_array, parse_array
from edge_agent.http.datatypes import BINARY_ONLY, BYTES, DATATYPE_OF, Array
from edge_agent.http.json_tensors import build_tensor
from edge_agent.http.oip import InferRequest, check_head, check_tensor, choose_outputs
from models.contract.manifest import ModelManifest

PROTO_NAME: Final = "grpc_service.proto"
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


def load_messages() -> dict[str, Any]:
    """Return the message classes of the protocol by name."""
    from edge_agent.rpc.proto import build_messages

    return build_messages(PROTO_NAME, resources.files("edge_agent.rpc").joinpath(PROTO_NAME).read_text("utf-8"))


def parse_message(kind: Any, data: bytes) -> Any:
    """Return the message of class `kind` in `data`; raises RequestError."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestError(f"expected a message {kind.DESCRIPTOR.full_name}: {error}") from error


def parse_infer_message(message: Any) -> InferRequest:
    """Return the request in a `ModelInferRequest`; whether it fits a model is the model's to say.

    Raises:
        RequestError: Data that are not what they are said to be, too much, or too many of anything.
    """
    names, outputs = [tensor.name for tensor in message.inputs], [output.name for output in message.outputs]
    check_head(message.id, names, outputs)
    raw = tuple(message.raw_input_contents)
    if raw and len(raw) != len(names):
        raise RequestError(f"expected raw_input_contents for each of {len(names)} inputs, got {len(raw)}")
    inputs = {}
    for index, tensor in enumerate(message.inputs):
        check_tensor(tensor.name, tensor.datatype, tensor.shape)
        inputs[tensor.name] = _parse_raw(tensor, raw[index]) if raw else _parse_contents(tensor)
    key = _find_sequence(message.parameters) or message.id
    return InferRequest(message.id, inputs, dict.fromkeys(outputs, bool(raw)), bool(raw), key)


def build_infer_message(
    kind: Any, manifest: ModelManifest, request: InferRequest, outputs: Mapping[str, Array], feedback_id: str
) -> Any:
    """Return the answer to `request`, raw if it was, or if an output has no typed contents.

    Args:
        kind: The class `ModelInferResponse`.
        manifest: Of the version that answered.
        request: What was asked.
        outputs: All of the model, by name.
        feedback_id: The server's own id; it is the answer's, or a parameter beside the caller's.

    Raises:
        RequestError: An output was asked for that the model does not have.
    """
    wanted = choose_outputs(manifest, request)
    response = kind(model_name=manifest.model, model_version=str(manifest.version), id=request.id or feedback_id)
    if feedback_id and request.id:
        response.parameters["feedback_id"].string_param = feedback_id
    is_raw = request.is_binary or any(DATATYPE_OF[outputs[name].dtype] in BINARY_ONLY for name in wanted)
    for name in wanted:
        array = outputs[name]
        datatype = DATATYPE_OF[array.dtype]
        tensor = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if is_raw:
            response.raw_output_contents.append(build_array(array))
        else:
            values = array.ravel().tolist()
            texts = [str(value).encode() for value in values] if datatype == BYTES else values
            getattr(tensor.contents, _CONTENTS[datatype]).extend(texts)
    return response


def _parse_raw(tensor: Any, data: bytes) -> Array:
    if tensor.HasField("contents"):
        raise RequestError(f"input {tensor.name!r:.80}: expected contents or raw_input_contents, got both")
    return parse_array(memoryview(data), tensor.datatype, tensor.shape, tensor.name)


def _parse_contents(tensor: Any) -> Array:
    name, datatype = tensor.name, tensor.datatype
    if datatype in BINARY_ONLY:
        raise RequestError(
            f"input {name!r:.80}: expected {datatype} in raw_input_contents: contents have no such numbers"
        )
    field = _CONTENTS[datatype]
    if others := [found.name for found, _ in tensor.contents.ListFields() if found.name != field]:
        raise RequestError(f"input {name!r:.80}: expected {datatype} in {field}, got {others[0]}")
    values = list(getattr(tensor.contents, field))
    if datatype == BYTES:
        values = _parse_texts(values, name)
    return build_tensor(values, datatype, tensor.shape, name)


def _parse_texts(values: list[bytes], name: str) -> list[str]:
    if len(values) > STRINGS_MAX:
        raise RequestError(f"input {name!r:.80}: expected at most {STRINGS_MAX} strings, got {len(values)}", status=413)
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise RequestError(f"input {name!r:.80}: a string is not UTF-8") from error


def _find_sequence(parameters: Any) -> str:
    """Return the parameter `sequence_id`, empty without one; 0 is none, too."""
    if "sequence_id" not in parameters:
        return ""
    parameter = parameters["sequence_id"]
    kind = parameter.WhichOneof("parameter_choice")
    return "" if kind is None else str(getattr(parameter, kind) or "")
