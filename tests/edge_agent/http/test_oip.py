"""Open Inference Protocol requests become arrays, or a sentence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import RequestError
from edge_agent.http.oip import build_infer_response, parse_infer_request
from edge_agent.http.samples import parse_samples
from models.contract.manifest import FileEntry, ModelManifest
from models.tensors.spec import TensorSpec

MANIFEST = ModelManifest(
    model="m",
    version=5,
    runtime="onnx",
    inputs=(TensorSpec("x", ("batch", 2), "float32"),),
    outputs=(TensorSpec("a", ("batch", 1), "float32"), TensorSpec("b", ("batch",), "int64")),
    files={"inference.onnx": FileEntry(digest="0" * 64, size_bytes=1)},
)
OUTPUTS = {"a": np.array([[0.5], [np.nan]], np.float32), "b": np.array([1, 2])}


def request(**tensor: object) -> bytes:
    return json.dumps(
        {"inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4], **tensor}]}
    ).encode()


@pytest.mark.parametrize("data", [[1, 2.5, 3, 4], [[1, 2.5], [3, 4]]])
def test_flat_and_nested_data_are_the_same(data: list) -> None:
    parsed = parse_infer_request(request(data=data)).inputs["x"]
    np.testing.assert_array_equal(parsed, np.array([[1, 2.5], [3, 4]], np.float32))
    assert parsed.dtype == np.float32


@pytest.mark.parametrize(
    ("datatype", "values", "dtype"),
    [
        ("FP32", [1e-3, -2], np.float32),
        ("FP64", [1e300, 0], np.float64),
        ("INT8", [-128, 127], np.int8),
        ("UINT8", [0, 255], np.uint8),
        ("INT32", [-(2**31), 2**31 - 1], np.int32),
        ("INT64", [-(2**63), 2**63 - 1], np.int64),
        ("INT16", [-(2**15), 2**15 - 1], np.int16),
        ("UINT16", [0, 2**16 - 1], np.uint16),
        ("UINT32", [0, 2**32 - 1], np.uint32),
        ("UINT64", [0, 2**64 - 1], np.uint64),
        ("BOOL", [True, False], np.bool_),
    ],
)
def test_every_datatype_comes_through_exactly(datatype: str, values: list, dtype: type) -> None:
    parsed = parse_infer_request(request(datatype=datatype, shape=[1, 2], data=values)).inputs["x"]
    assert parsed.dtype == dtype
    assert parsed.tolist() == [pytest.approx(values)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "as JSON in UTF-8"),
        (b"{", "as JSON in UTF-8"),
        (b"\xff\xfe", "as JSON in UTF-8"),
        (b'{"inputs": [{"name": "\xff"}]}', "as JSON in UTF-8"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": [{}]}', "missing required field `name`"),
        (b'{"inputs": ' + b"[" * 100_000, "JSON"),
        (request(datatype="FP16"), "expected FP16 as binary data"),
        (request(datatype=7), "Expected `str`, got `int`"),
        (request(shape=[2, 3]), r"shape \[2, 3\] has 6 values, data has 4"),
        (request(shape=[]), "expected a shape of 1 to 16"),
        (request(shape=[4, -1, -1]), "lengths >= 1"),
        (request(shape=[0]), "lengths >= 1"),
        (request(shape=[2, *[2**62] * 8]), "data has 4"),
        (request(shape=[2**62, 2]), "at most 16384 rows"),
        (request(shape=[1] * 17), "expected a shape of 1 to 16"),
        (request(data="1234"), "Expected `array`, got `str`"),
        (request(data=[1, 2, 3, "4"]), "Expected `float`, got `str`"),
        (request(data=[1, 2, 3, None]), "got `null`"),
        (request(data=[[1, 2], [3]]), "data has 3"),
        (request(data=[[1, 2], 3, 4]), "got `array`"),
        (request(data=[1, 2, 3, 1e39]), "beyond FP32"),
        (request(data=[1, 2, 3, float("nan")]), "JSON"),
        (request(data=[1, 2, 3, float("inf")]), "JSON"),
        (request(datatype="INT8", data=[1, 2, 3, 128]), "beyond INT8"),
        (request(datatype="UINT8", data=[1, 2, 3, -1]), "beyond UINT8"),
        (request(datatype="INT64", data=[1, 2, 3, 2**63]), "beyond INT64"),
        (request(datatype="INT32", data=[1, 2, 3, 0.5]), "Expected `int`, got `float`"),
        (request(datatype="BOOL", data=[1, 0, 1, 0]), "Expected `bool`, got `int`"),
        (request().replace(b"}]}", b"}," + request()[len(b'{"inputs": [') :]), "a name twice"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(body: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        parse_infer_request(body)
    assert refused.value.status == (413 if "at most" in said else 400)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_end_in_anything_else(body: bytes) -> None:
    for parse in (parse_infer_request, parse_samples):
        with pytest.raises(RequestError):
            parse(body)


def test_response_names_model_version_and_id_and_says_null_for_nan() -> None:
    asked = parse_infer_request(request()[:-1] + b', "id": "42"}')
    assert json.loads(build_infer_response(MANIFEST, asked, OUTPUTS).body) == {
        "model_name": "m",
        "model_version": "5",
        "id": "42",
        "outputs": [
            {"name": "a", "shape": [2, 1], "datatype": "FP32", "data": [0.5, None]},
            {"name": "b", "shape": [2], "datatype": "INT64", "data": [1, 2]},
        ],
    }


def test_only_the_outputs_asked_for_are_returned() -> None:
    asked = parse_infer_request(request()[:-1] + b', "outputs": [{"name": "b"}]}')
    assert [
        output["name"] for output in json.loads(build_infer_response(MANIFEST, asked, OUTPUTS).body)["outputs"]
    ] == ["b"]
    asked = parse_infer_request(request()[:-1] + b', "outputs": [{"name": "c"}]}')
    with pytest.raises(RequestError, match="'c': expected one of 'a', 'b'"):
        build_infer_response(MANIFEST, asked, OUTPUTS)


def test_samples_keep_what_json_said() -> None:
    (x, y), (image, flag) = parse_samples(b'{"samples": [{"x": [0.5, 1], "y": 3}, {"x": [[0.1]], "y": true}]}')
    assert (x.dtype, x.tolist(), y.dtype, int(y)) == (np.float32, [0.5, 1.0], np.int64, 3)
    assert (image.dtype, image.shape, flag.dtype) == (np.float64, (1, 1), np.bool_)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ('{"x": [1]}', "missing required field `y`"),
        ('{"x": [[1, 2], [3]], "y": 0}', r"samples\[0\]\.x: expected a number"),
        ('{"x": ["a"], "y": 0}', "finite numbers or bools"),
        ('{"x": [null], "y": 0}', "finite numbers or bools"),
        ('{"x": [{"a": 1}], "y": 0}', "finite numbers or bools"),
        ('{"x": [], "y": 0}', "finite numbers or bools"),
        ('{"x": [1], "y": ["cat"]}', r"samples\[0\]\.y"),
        (f'{{"x": [{2**64}], "y": 0}}', "finite numbers or bools"),
        ('{"x": ' + "[" * 70 + "1" + "]" * 70 + ', "y": 0}', r"samples\[0\]\.x"),
    ],
)
def test_bad_samples_are_refused_in_a_sentence(sample: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_samples(f'{{"samples": [{sample}]}}'.encode())
