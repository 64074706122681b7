"""Requests to arrays and arrays to responses, in typed contents and raw."""

from typing import Any

import numpy as np
import pytest

from edge_agent.errors import RequestError
from edge_agent.http.datatypes import DTYPES
from edge_agent.rpc.messages import build_infer_message, load_messages, parse_infer_message
from edge_agent.rpc.proto import build_messages
from models.contract.encoding import build_digest
from models.contract.manifest import FileEntry, ModelManifest
from models.tensors.spec import TensorSpec

MESSAGES = load_messages()
VALUES = {
    "FP32": [1.5, float("nan"), float("-inf"), 1e-30],
    "FP64": [1e300, -0.0, 3, 4],
    "INT8": [-128, 127, 0, 1],
    "INT16": [-(2**15), 2**15 - 1, 0, 1],
    "INT32": [-(2**31), 2**31 - 1, 0, 1],
    "INT64": [-(2**63), 2**63 - 1, 0, 1],
    "UINT8": [0, 255, 1, 2],
    "UINT16": [0, 2**16 - 1, 1, 2],
    "UINT32": [0, 2**32 - 1, 1, 2],
    "UINT64": [0, 2**64 - 1, 1, 2],
    "BOOL": [True, False, False, True],
    "BYTES": ["", "a", "日本", "\0"],
}
FIELDS = {"FP32": "fp32", "FP64": "fp64", "INT64": "int64", "UINT64": "uint64", "BOOL": "bool", "BYTES": "bytes"}


def build_version(**dtypes: np.dtype[Any]) -> ModelManifest:
    specs = tuple(
        TensorSpec(name, ("batch", 2), "string" if dtype.kind == "O" else dtype.name) for name, dtype in dtypes.items()
    )
    files = {"inference.onnx": FileEntry(digest=build_digest(b""), size_bytes=1)}
    return ModelManifest(model="m", version=1, runtime="onnx", inputs=specs, outputs=specs, files=files)


def build_request(datatype: str) -> Any:
    field = FIELDS.get(datatype, "uint" if datatype.startswith("U") else "int") + "_contents"
    values = [value.encode() if isinstance(value, str) else value for value in VALUES[datatype]]
    tensor = {"name": "x", "datatype": datatype, "shape": [2, 2], "contents": {field: values}}
    return MESSAGES["ModelInferRequest"](model_name="m", inputs=[tensor])


@pytest.mark.parametrize("datatype", VALUES)
def test_typed_contents_come_back_as_they_went(datatype: str) -> None:
    message = build_request(datatype)
    asked = parse_infer_message(message)
    array = asked.inputs["x"]
    assert (array.shape, array.dtype) == ((2, 2), DTYPES[datatype])
    version = build_version(x=array.dtype)
    response = build_infer_message(MESSAGES["ModelInferResponse"], version, asked, {"x": array}, "")
    assert not response.raw_output_contents
    assert response.outputs[0].contents.SerializeToString() == message.inputs[0].contents.SerializeToString()


def test_typed_request_is_answered_raw_where_an_output_has_no_typed_contents() -> None:
    asked = parse_infer_message(build_request("FP32"))
    version = build_version(x=np.dtype(np.float32), half=np.dtype(np.float16))
    outputs = {"x": asked.inputs["x"], "half": np.array([[0.5, 1], [2, 3]], np.float16)}
    response = build_infer_message(MESSAGES["ModelInferResponse"], version, asked, outputs, "")
    assert [len(data) for data in response.raw_output_contents] == [16, 8]
    assert not any(tensor.HasField("contents") for tensor in response.outputs)


def test_key_is_the_sequence_or_the_id_and_feedback_has_an_id_of_its_own() -> None:
    message = build_request("FP32")
    assert parse_infer_message(message).key == ""
    message.id = "7"
    message.parameters["sequence_id"].int64_param = 0
    assert parse_infer_message(message).key == "7"
    for field, value, key in (("int64_param", 3, "3"), ("uint64_param", 2**63, str(2**63)), ("string_param", "a", "a")):
        setattr(message.parameters["sequence_id"], field, value)
        assert parse_infer_message(message).key == key
    asked, version = parse_infer_message(message), build_version(x=np.dtype(np.float32))
    response = build_infer_message(MESSAGES["ModelInferResponse"], version, asked, asked.inputs, "secret")
    assert (response.id, response.parameters["feedback_id"].string_param) == ("7", "secret")
    asked.id = ""
    response = build_infer_message(MESSAGES["ModelInferResponse"], version, asked, asked.inputs, "secret")
    assert (response.id, len(response.parameters)) == ("secret", 0)


def test_bf16_is_taken_raw_as_fp32_and_not_typed() -> None:
    tensor = {"name": "x", "datatype": "BF16", "shape": [1, 2]}
    raw = MESSAGES["ModelInferRequest"](inputs=[tensor], raw_input_contents=[b"\x80\x3f\x00\xc0"])
    assert parse_infer_message(raw).inputs["x"].tolist() == [[1.0, -2.0]]
    with pytest.raises(RequestError, match="BF16 in raw_input_contents"):
        parse_infer_message(MESSAGES["ModelInferRequest"](inputs=[tensor]))


def test_proto_that_is_not_understood_raises() -> None:
    with pytest.raises(ValueError, match="expected ';', got '\\['"):
        build_messages("x.proto", 'syntax = "proto3"; package x; message A { int32 a = 1 [deprecated = true]; }')
