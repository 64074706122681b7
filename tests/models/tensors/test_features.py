"""Raw rows become the same input wherever they are read, and what cannot become one is refused by name."""

import csv
import io
import json
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tensors.features import Feature, RowError, Tokens, build_inputs, check_features, is_missing
from models.tensors.spec import TensorSpec

HEART = (
    Feature("age", impute=54, clip=(0, 120), scale=(54.4, 9.1)),
    Feature("smokes"),
    Feature("pain", one_hot=("none", "typical", "3")),
    Feature("street", impute="", hash=4),
)
X = (TensorSpec("features", ("batch", 9), "float32"),)
NOTE = (Feature("note", impute="", tokenise=Tokens(length=4, words=("no", "pain"))),)
IDS = (TensorSpec("ids", ("batch", 4), "int64"),)
ROW = {"age": 60, "smokes": True, "pain": "typical", "street": "Hill Road 7"}


def build(row: dict) -> np.ndarray:
    (array,) = build_inputs(HEART, X, [row]).values()
    return array[0]


def test_row_becomes_its_columns_in_the_order_of_the_definition() -> None:
    array = build(ROW)
    assert array.dtype == np.float32
    assert array[0] == np.float32((60 - 54.4) / 9.1)
    assert array[1:5].tolist() == [1, 0, 1, 0]
    assert sorted(array[5:]) == [0, 0, 0, 1]


def test_hash_is_the_same_on_every_machine() -> None:
    assert build(ROW)[5:].tolist() == [0, 0, 1, 0]
    buckets = (Feature("note", tokenise=Tokens(length=4, buckets=100)),)
    assert build_inputs(buckets, IDS, [{"note": "No pain"}])["ids"].tolist() == [[55, 60, 0, 0]]


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_missing_value_is_imputed_from_the_definition_or_refused(value: object) -> None:
    assert is_missing(value)
    assert build(ROW | {"age": value})[0] == build(ROW | {"age": 54})[0]
    with pytest.raises(RowError, match="row 1: column 'pain' is missing"):
        build_inputs(HEART, X, [ROW, ROW | {"pain": value}])
    del (row := dict(ROW))["age"]
    assert build(row)[0] == build(ROW | {"age": 54})[0]


def test_unknown_category_is_none_of_the_known() -> None:
    assert build(ROW | {"pain": "atypical"})[2:5].tolist() == [0, 0, 0]


def test_categories_may_be_numbers_and_bools_too() -> None:
    assert build(ROW | {"pain": 3})[2:5].tolist() == build(ROW | {"pain": 3.0})[2:5].tolist() == [0, 0, 1]
    feature = (Feature("on", one_hot=("true", "false")),)
    spec = (TensorSpec("x", ("batch", 2), "int64"),)
    assert build_inputs(feature, spec, [{"on": False}, {"on": "true"}])["x"].tolist() == [[0, 1], [1, 0]]


def test_number_beyond_the_clip_becomes_its_end() -> None:
    assert build(ROW | {"age": 1e9})[0] == build(ROW | {"age": 120})[0]
    assert build(ROW | {"age": -1})[0] == build(ROW | {"age": 0})[0]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("No pain, no PAIN at all", [2, 3, 2, 3]),  # too long: cut off
        ("pain?", [3, 0, 0, 0]),
        ("größer pain", [1, 3, 0, 0]),
        ("", [0, 0, 0, 0]),
        (None, [0, 0, 0, 0]),
        (7, [1, 0, 0, 0]),
        ("pain " * 100_000, [3, 3, 3, 3]),
    ],
)
def test_text_becomes_ids_of_fixed_length(text: object, ids: list[int]) -> None:
    assert build_inputs(NOTE, IDS, [{"note": text}])["ids"].tolist() == [ids]
    assert NOTE[0].tokenise is not None
    assert NOTE[0].tokenise.size == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW | {"age": "old"}, "row 0: column 'age': expected a finite number"),
        (ROW | {"age": "1_0"}, "expected a finite number"),
        (ROW | {"age": float("inf")}, "expected a finite number"),
        (ROW | {"age": 10**400}, "expected a finite number"),
        (ROW | {"age": [1]}, "expected a finite number"),
        (ROW | {"smokes": 1e300}, "no finite float32"),
        (ROW | {"pain": {}}, "expected text"),
        (ROW | {"street": "\ud800"}, "column 'street'"),
        ([1, 2], "names of their columns"),
    ],
)
def test_value_of_no_use_is_refused_with_its_column(row: object, said: str) -> None:
    with pytest.raises(RowError, match=said):
        build_inputs(HEART, X, [row])


cells = st.fixed_dictionaries(
    {
        "age": st.none() | st.integers(-(10**18), 10**18) | st.floats(-1e30, 1e30),
        "smokes": st.booleans() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        "pain": st.sampled_from(["none", "typical", "3", " typical", "unknown"]) | st.integers(1, 9),
        "street": st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0")),
    }
)


@given(st.lists(cells, min_size=1, max_size=9))
def test_rows_give_identical_bits_alone_in_a_batch_from_json_and_from_csv(rows: list[dict]) -> None:
    expected = build_inputs(HEART, X, rows)["features"].tobytes()
    assert b"".join(build_inputs(HEART, X, [row])["features"].tobytes() for row in rows) == expected
    assert build_inputs(HEART, X, json.loads(json.dumps(rows)))["features"].tobytes() == expected
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    file.seek(0)
    assert build_inputs(HEART, X, list(csv.DictReader(file)))["features"].tobytes() == expected


def test_definition_constants_are_decimals_whatever_they_were_written_as() -> None:
    assert Feature("a", scale=(0.1, 2)) == Feature("a", scale=(Decimal("0.1"), Decimal(2)))
    assert Feature("a", impute=0.5).impute == "0.5"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"column": ""}, "column"),
        ({"one_hot": ("a",), "hash": 2}, "only one of"),
        ({"hash": 2, "scale": (0, 1)}, "for numbers"),
        ({"clip": (2, 1)}, "least"),
        ({"scale": (0, 0)}, "spread"),
        ({"scale": (0, "x")}, "two numbers"),
        ({"scale": (0, "inf")}, "finite"),
        ({"one_hot": ("a", "a")}, "each once"),
        ({"one_hot": ("a ",)}, "blanks"),
        ({"one_hot": ("a",), "impute": "b"}, "none of its categories"),
        ({"impute": "x"}, "finite number"),
        ({"hash": -1}, "at most"),
    ],
)
def test_feature_that_makes_no_sense_is_refused(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Feature(**{"column": "a"} | arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"length": 0, "buckets": 1},
        {"length": 1},
        {"length": 1, "words": ("a",), "buckets": 1},
        {"length": 1, "words": ("a", "a")},
        {"length": 1, "words": ("A",)},
        {"length": 1, "words": ("a b",)},
        {"length": 1, "words": tuple(f"w{number}" for number in range(9999))},
    ],
)
def test_tokens_that_make_no_sense_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="tokenise"):
        Tokens(**arguments)


@pytest.mark.parametrize(
    ("features", "specs", "said"),
    [
        (HEART, IDS, r"shape \('batch', 9\)"),
        (HEART, X + X, r"one input"),
        (NOTE, (TensorSpec("x", ("batch", 4), "float32"),), "tokenise makes integers"),
        (HEART, (TensorSpec("x", ("batch", 9), "bool"),), "numbers"),
        (HEART, (TensorSpec("x", ("batch", 9), "string"),), "numbers"),
    ],
)
def test_features_that_do_not_fill_the_input_are_refused(features: tuple, specs: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_features(features, specs)
    check_features((), specs)
    check_features(HEART, X)


IMAGE = TensorSpec("image", ("batch", 1, 2, 2), "float32")


@pytest.mark.parametrize(
    "row",
    [[[[1, 2], [3, 4]]], [1, 2, 3, 4], ["1", "2.0", "3", "4"], {"a": 1, "b": 2, "c": "3", "d": 4}, np.arange(1, 5)],
)
def test_model_without_features_takes_numbers_in_their_order(row: object) -> None:
    assert build_inputs((), (IMAGE,), [row])["image"].tolist() == [[[[1, 2], [3, 4]]]]


def test_model_without_features_takes_each_tensor_under_its_name() -> None:
    specs = (TensorSpec("a", ("batch", 1), "float32"), TensorSpec("b", ("batch", 1), "string"))
    inputs = build_inputs((), specs, [{"a": 1, "b": "x"}, {"a": "2", "b": 3.0}])
    assert inputs["a"].tolist() == [[1], [2]]
    assert inputs["b"].tolist() == [["x"], ["3"]]
    with pytest.raises(RowError, match="input 'b' is missing"):
        build_inputs((), specs, [{"a": 1}])
    with pytest.raises(RowError, match="by their names"):
        build_inputs((), specs, [[1, "x"]])


def test_whole_numbers_keep_all_their_digits_beside_fractions() -> None:
    spec = TensorSpec("x", ("batch", 1), "int64")
    assert build_inputs((), (spec,), [[2**62 + 1], [3.0]])["x"].tolist() == [[2**62 + 1], [3]]


@pytest.mark.parametrize(
    ("spec", "row", "said"),
    [
        (IMAGE, [1, 2, 3], r"row 1: input 'image': expected values of shape \(1, 2, 2\), got \(3,\)"),
        (IMAGE, [[1, 2], [3, 4]], "expected values of shape"),
        (IMAGE, [1, 2, 3, "x"], "finite number"),
        (IMAGE, [1, 2, 3, 1e300], "row 1: input 'image': a value is no finite float32"),
        (IMAGE, [[1], [2, 3]], "inhomogeneous"),
        (TensorSpec("x", ("batch", 1), "int8"), [300], "no finite int8"),
        (TensorSpec("x", ("batch", 1), "int8"), [0.5], "no finite int8"),
        (TensorSpec("x", ("batch", 1), "uint64"), [2**64], "64 bits"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(spec: TensorSpec, row: list, said: str) -> None:
    good = [0] * int(np.prod(spec.row_shape))
    with pytest.raises(RowError, match=said):
        build_inputs((), (spec,), [good, row])
