"""Binary tensors come through bit by bit, or a sentence says why not."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_agent.errors import RequestError
from edge_agent.http.binary import build_array, parse_array, split_body
from edge_agent.http.datatypes import DATATYPE_OF, DTYPES
from edge_agent.http.oip import InferRequest, build_infer_response, parse_infer_request
from models.contract.manifest import FileEntry, ModelManifest
from models.tensors.spec import TensorSpec

NUMBERS = [dtype for datatype, dtype in DTYPES.items() if datatype != "BYTES"]
SHAPES = arrays.array_shapes(max_dims=4, max_side=5)
FP32 = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
MANIFEST = ModelManifest(
    model="m",
    version=1,
    runtime="onnx",
    inputs=(TensorSpec("x", ("batch", 2), "float32"),),
    outputs=(TensorSpec("half", ("batch",), "float16"), TensorSpec("text", ("batch",), "string")),
    files={"inference.onnx": FileEntry(digest="0" * 64, size_bytes=1)},
)


@given(st.sampled_from(NUMBERS).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES)), st.integers(0, 7))
def test_numbers_come_through_bit_by_bit_wherever_they_lie(array: np.ndarray, offset: int) -> None:
    data = memoryview(bytes(offset) + build_array(array))[offset:]
    parsed = parse_array(data, DATATYPE_OF[array.dtype], array.shape, "x")
    assert (parsed.dtype, parsed.shape, parsed.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert parsed.flags.aligned


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_strings_come_through(texts: list[str]) -> None:
    array = np.array(texts, object)
    assert parse_array(memoryview(build_array(array)), "BYTES", [len(texts)], "x").tolist() == texts


@given(st.binary(max_size=60), st.sampled_from(list(DTYPES)), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_bytes_that_are_no_tensor_end_in_nothing_but_a_sentence(data: bytes, datatype: str, shape: list[int]) -> None:
    try:
        array = parse_array(memoryview(data), datatype, shape, "x")
    except RequestError:
        return
    assert array.shape == tuple(shape)


def test_numbers_that_lie_well_are_not_copied() -> None:
    data = np.arange(4, dtype=np.float32)
    assert np.shares_memory(parse_array(memoryview(data).cast("B"), "FP32", [2, 2], "x"), data)


@pytest.mark.parametrize("header", [b"", b"-1", b"+1", b" 1", b"1.0", b"x", b"\xb2", b"9" * 5000])
def test_header_that_is_no_length_is_refused(header: bytes) -> None:
    with pytest.raises(RequestError, match="expected the length of the JSON in bytes, got"):
        split_body(b"{}", header)


def test_header_beyond_the_body_is_refused() -> None:
    with pytest.raises(RequestError, match="says 3 bytes, the body has 2"):
        split_body(b"{}", b"3")


def body(*inputs: dict, rest: bytes = b"") -> tuple[bytes, bytes]:
    text = json.dumps({"inputs": inputs}).encode()
    return text + rest, b"%d" % len(text)


def sized(size: object, **changes: object) -> dict:
    return {**FP32, "parameters": {"binary_data_size": size}, **changes}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (body(FP32, rest=bytes(7)), "is 8, the binary part has 7 bytes left"),
        (body(FP32, rest=bytes(9)), "add up to 8 bytes, the binary part has 9"),
        (body(FP32), "is the header Inference-Header-Content-Length there"),
        (body(sized(-1), rest=bytes(8)), "must be >= 0, is -1"),
        (body(sized("8"), rest=bytes(8)), "Expected `int | null`, got `str`"),
        (body(sized(4), rest=bytes(4)), r"FP32 of shape \[1, 2\] has 8 bytes, got 4"),
        (body(sized(8, shape=[1, *[2**62] * 8]), rest=bytes(8)), "bytes, got 8"),
        (body({**FP32, "data": [1, 2]}, rest=bytes(8)), "either data or the parameter"),
        (body(sized(None)), "either data or the parameter"),
        (body(sized(2, datatype="BOOL"), rest=b"\x01\x02"), "bytes 0 and 1 as BOOL"),
        (body(sized(3, datatype="BYTES"), rest=bytes(3)), "4-byte length is cut off"),
        (body(sized(5, datatype="BYTES"), rest=struct.pack("<I", 2) + b"a"), "string 0 is of 2 bytes, 1 are left"),
        (body(sized(5, datatype="BYTES"), rest=struct.pack("<I", 1) + b"\xff"), "string 0 is not UTF-8"),
        (body(sized(5, datatype="BYTES"), rest=struct.pack("<I", 1) + b"a"), "has 2 strings, the binary data 1"),
    ],
)
def test_bad_binary_requests_are_refused_in_a_sentence(asked: tuple[bytes, bytes], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        parse_infer_request(*asked)
    assert refused.value.status == 400


def test_inputs_as_json_and_binary_data_go_together() -> None:
    written = {"name": "t", "shape": [2], "datatype": "BYTES", "data": ["a", "ü"]}
    halves = np.array([0.5, -2], np.float16)
    second = {"name": "h", "shape": [2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}
    rest = np.array([1, 2], "<f4").tobytes() + halves.tobytes()
    inputs = parse_infer_request(*body(FP32, written, second, rest=rest)).inputs
    assert {name: array.tolist() for name, array in inputs.items()} == {
        "x": [[1, 2]],
        "t": ["a", "ü"],
        "h": [0.5, -2],
    }


def test_each_output_is_answered_as_it_was_asked_for() -> None:
    outputs = {"half": np.array([0.5], np.float16), "text": np.array(["ü"], object)}
    response = build_infer_response(MANIFEST, InferRequest("", {}, {"half": True, "text": False}), outputs)
    assert response.json_bytes is not None
    half, text = json.loads(response.body[: response.json_bytes])["outputs"]
    assert (half["parameters"], text["data"]) == ({"binary_data_size": 2}, ["ü"])
    assert response.body[response.json_bytes :] == outputs["half"].tobytes()
    everything = build_infer_response(MANIFEST, InferRequest("", {}, {}, is_binary=True), outputs)
    assert everything.body.endswith(outputs["half"].tobytes() + b"\x02\0\0\0" + "ü".encode())
    with pytest.raises(RequestError, match="FP16 is answered as binary data only"):
        build_infer_response(MANIFEST, InferRequest("", {}, {}), outputs)
