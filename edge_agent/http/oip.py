"""Open Inference Protocol v2: requests to arrays and arrays to responses, as JSON or binary; pure.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge_agent.errors import RequestError
from edge_agent.http.binary import BinaryPart, Places, build_array, parse_array, split_body
from edge_agent.http.datatypes import BF16, DATATYPE_OF, DTYPES, Array
from edge_agent.http.json_tensors import DECODE_ERRORS, list_values, parse_data
from models.contract.manifest import ModelManifest

TENSORS_MAX = 64
AXES_MAX = 16  # NumPy 1 takes 32 axes; no model here has more than 5
ROWS_MAX = 16_384  # what a row becomes is not bounded by what it was: answers may be many times as long as requests
ID_MAX_CHARACTERS = 1024
_KNOWN_MAX_BYTES = 2048


_NO_DATA = msgspec.Raw(b"")


class _InputParameters(msgspec.Struct):
    binary_data_size: int | None = None


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = _NO_DATA
    parameters: _InputParameters | None = None

    @property
    def size_bytes(self) -> int | None:
        """Of the binary data; None for data in JSON."""
        return None if self.parameters is None else self.parameters.binary_data_size


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _RequestParameters(msgspec.Struct):
    binary_data_output: bool = False
    sequence_id: int | str = ""


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    outputs: list[_Output] = []
    parameters: _RequestParameters | None = None


class _OutputTensor(msgspec.Struct, omit_defaults=True):
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, int] | None = None


class _Response(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_OutputTensor]
    id: str = ""
    parameters: dict[str, str] | None = None


_DECODER = msgspec.json.Decoder(_Request)
_ENCODER = msgspec.json.Encoder()


@dataclass(slots=True)
class InferRequest:
    """What a caller asked.

    Attributes:
        id: The caller's own, given back.
        inputs: By name.
        outputs: Names of the outputs wanted, and whether as binary data; all of them if empty.
        is_binary: Whether outputs are, of which that is not said.
        key: Requests of one key get the same version of the model.
    """

    id: str
    inputs: dict[str, Array]
    outputs: dict[str, bool]
    is_binary: bool = False
    key: str = ""


@dataclass(slots=True)
class InferResponse:
    """The body of an answer.

    Attributes:
        body: JSON, and the binary part behind it.
        json_bytes: How long the JSON is; None without a binary part.
    """

    body: bytes
    json_bytes: int | None = None


@dataclass(slots=True)
class _Head:
    """The JSON of a request, checked, but for the values of its tensors.

    Attributes:
        places: Of the inputs in the binary part, if it can be told from this alone.
    """

    id: str
    key: str
    is_binary: bool
    outputs: dict[str, bool]
    inputs: tuple[_Input, ...]
    places: Places | None


def parse_infer_request(body: bytes | bytearray, header: bytes | None = None) -> InferRequest:
    """Return the request in `body`; whether it fits a model is the model's to say.

    Args:
        body: JSON, perhaps with binary tensors behind it.
        header: `Inference-Header-Content-Length`, if the request has it.

    Raises:
        RequestError: Not JSON, not an inference request, or data that are not what they are said to be; 413 for too
            many rows.
    """
    text, rest = split_body(body, header)
    is_short = header is not None and len(text) <= _KNOWN_MAX_BYTES
    head = _parse_known_head(bytes(text)) if is_short else _parse_head(text)
    inputs = None if head.places is None else head.places.view(rest)
    if inputs is None:
        binary = BinaryPart(rest)
        inputs = {tensor.name: _parse_values(tensor, binary) for tensor in head.inputs}
        binary.check_end()
    return InferRequest(head.id, inputs, head.outputs, head.is_binary, head.key)


def build_infer_response(
    manifest: ModelManifest, request: InferRequest, outputs: Mapping[str, Array], feedback_id: str = ""
) -> InferResponse:
    """Return the answer to `request`; a value that JSON cannot say (NaN, infinity) is null there.

    Args:
        manifest: Of the version that answered.
        request: What was asked.
        outputs: All of the model, by name.
        feedback_id: The server's own id; it is the answer's, or a parameter beside the caller's.

    Raises:
        RequestError: An output was asked for that the model does not have, or FP16 as JSON.
    """
    wanted = choose_outputs(manifest, request)
    parts = {name: build_array(outputs[name]) for name, is_binary in wanted.items() if is_binary}
    if len(parts) == len(wanted) and not feedback_id:
        lengths = tuple(
            (name, outputs[name].shape, DATATYPE_OF[outputs[name].dtype], len(parts[name])) for name in parts
        )
        text = _encode_lengths(manifest.model, manifest.version, request.id, lengths)
    else:
        tensors = [
            _build_length(name, array.shape, DATATYPE_OF[array.dtype], len(parts[name]))
            if name in parts
            else _build_tensor(name, array)
            for name, array in ((name, outputs[name]) for name in wanted)
        ]
        response = _Response(manifest.model, str(manifest.version), tensors, request.id or feedback_id)
        if feedback_id and request.id:
            response.parameters = {"feedback_id": feedback_id}
        text = _ENCODER.encode(response)
    return InferResponse(b"".join((text, *parts.values())), len(text)) if parts else InferResponse(text)


def choose_outputs(manifest: ModelManifest, request: InferRequest) -> dict[str, bool]:
    """Return which outputs are wanted, and whether as binary data; raises RequestError for one that there is not."""
    names = [spec.name for spec in manifest.outputs]
    if unknown := [name for name in request.outputs if name not in names]:
        raise RequestError(f"output {unknown[0]!r:.80}: expected one of {', '.join(map(repr, names))}")
    return request.outputs or dict.fromkeys(names, request.is_binary)


def check_head(request_id: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise RequestError if a request has too long an id, or too many inputs or outputs, or one of them twice.

    Args:
        request_id: The caller's own.
        inputs: Names.
        outputs: Names of those wanted.
    """
    if len(inputs) > TENSORS_MAX or len(outputs) > TENSORS_MAX:
        raise RequestError(f"expected at most {TENSORS_MAX} inputs and {TENSORS_MAX} outputs")
    if len(request_id) > ID_MAX_CHARACTERS:
        raise RequestError(f"id: expected at most {ID_MAX_CHARACTERS} characters, got {len(request_id)}")
    if len(set(inputs)) != len(inputs):
        raise RequestError("expected each input once, got a name twice")


def check_tensor(name: str, datatype: str, shape: Sequence[int]) -> None:
    """Raise RequestError if an input of this name is of no known datatype, or of no shape that is taken."""
    if datatype not in DTYPES and datatype != BF16:
        expected = ", ".join((*DTYPES, BF16))
        raise RequestError(f"input {name!r:.80}: expected a datatype of {expected}, got {datatype!r:.80}")
    if not 1 <= len(shape) <= AXES_MAX or min(shape) < 1:
        raise RequestError(f"input {name!r:.80}: expected a shape of 1 to {AXES_MAX} lengths >= 1, got {shape!s:.80}")
    if shape[0] > ROWS_MAX:
        raise RequestError(f"input {name!r:.80}: expected at most {ROWS_MAX} rows, got {shape[0]}", status=413)


def build_tensors(inputs: Mapping[str, Array]) -> bytes:
    """Return `inputs` as a request has them, in a document of their own."""
    return _ENCODER.encode({"inputs": [_build_tensor(name, array) for name, array in inputs.items()]})


def _parse_head(text: bytes | bytearray | memoryview) -> _Head:
    try:
        request = _DECODER.decode(text)
    except DECODE_ERRORS as error:
        raise RequestError(
            f'expected {{"inputs": [{{"name", "shape", "datatype", "data"}}]}} as JSON in UTF-8: {error}'
        ) from error
    check_head(request.id, [tensor.name for tensor in request.inputs], [output.name for output in request.outputs])
    for tensor in request.inputs:
        _check_input(tensor)
    said = request.parameters or _RequestParameters()
    outputs = {output.name: _is_binary(output, default=said.binary_data_output) for output in request.outputs}
    key = str(said.sequence_id or request.id)
    places = Places.find((tensor.name, tensor.datatype, tensor.shape, tensor.size_bytes) for tensor in request.inputs)
    return _Head(request.id, key, said.binary_data_output, outputs, tuple(request.inputs), places)


# Binary tensors come behind the same few words again and again.
_parse_known_head = functools.lru_cache(maxsize=64)(_parse_head)


def _is_binary(output: _Output, *, default: bool) -> bool:
    said = None if output.parameters is None else output.parameters.binary_data
    return default if said is None else said


def _check_input(tensor: _Input) -> None:
    check_tensor(tensor.name, tensor.datatype, tensor.shape)
    if (tensor.size_bytes is None) != bool(tensor.data):
        raise RequestError(f"input {tensor.name!r:.80}: expected either data or the parameter binary_data_size")


def _parse_values(tensor: _Input, binary: BinaryPart) -> Array:
    size_bytes = tensor.size_bytes
    if size_bytes is None:
        return parse_data(tensor.data, tensor.datatype, tensor.shape, tensor.name)
    return parse_array(binary.take(size_bytes, tensor.name), tensor.datatype, tensor.shape, tensor.name)


def _build_length(name: str, shape: tuple[int, ...], datatype: str, size_bytes: int) -> _OutputTensor:
    return _OutputTensor(name, shape, datatype, None, {"binary_data_size": size_bytes})


@functools.lru_cache(maxsize=64)
def _encode_lengths(
    model: str, version: int, request_id: str, lengths: tuple[tuple[str, tuple[int, ...], str, int], ...]
) -> bytes:
    """Return what is before binary outputs; it, too, is the same again and again."""
    return _ENCODER.encode(_Response(model, str(version), [_build_length(*each) for each in lengths], request_id))


def _build_tensor(name: str, array: Array) -> _OutputTensor:
    return _OutputTensor(name, array.shape, DATATYPE_OF[array.dtype], list_values(array, name))
