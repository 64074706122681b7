"""Golden samples: what they look like on disk, and which answers are theirs."""

from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from models.contract.errors import MalformedError
from models.contract.golden import Golden, build_golden, explain_straying, parse_golden
from models.contract.manifest import FileEntry, ModelManifest, build_manifest, parse_manifest
from models.tensors.spec import TensorSpec

MANIFEST = ModelManifest(
    model="m",
    version=1,
    runtime="onnx",
    inputs=(TensorSpec("x", ("batch", 2), "float32"), TensorSpec("name", ("batch",), "string")),
    outputs=(TensorSpec("y", ("batch", 3), "float32"), TensorSpec("label", ("batch",), "int64")),
    files={"inference.onnx": FileEntry(digest="1" * 64, size_bytes=1)},
)
GOLDEN = Golden(
    inputs={"x": np.array([[1, 2], [3, 4]], np.float32), "name": np.array(["a", ""], object)},
    outputs={"y": np.array([[0, 4, 1], [9, 0, 1]], np.float32), "label": np.array([1, 0])},
    tolerance=0.1,
)


def test_golden_samples_come_back_as_they_were() -> None:
    found = parse_golden(build_golden(GOLDEN), MANIFEST)
    assert found.tolerance == 0.1
    for before, after in ((GOLDEN.inputs, found.inputs), (GOLDEN.outputs, found.outputs)):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_manifest_names_them_and_one_without_them_is_as_it_was() -> None:
    named = replace(MANIFEST, golden=FileEntry(digest="2" * 64, size_bytes=9))
    assert parse_manifest(build_manifest(named)) == named
    assert set(named.all_files) == {"inference.onnx", "golden.bin"}
    assert named.serving_names == ("inference.onnx",)
    assert b"golden" not in build_manifest(MANIFEST)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        zstandard.compress(b"junk"),
        zstandard.compress(bytes(1 << 24)),
        build_golden(GOLDEN)[:-9],
        build_golden(replace(GOLDEN, tolerance=0.0)),
        build_golden(replace(GOLDEN, inputs={"x": GOLDEN.inputs["x"]})),
        build_golden(replace(GOLDEN, inputs=GOLDEN.inputs | {"x": np.zeros((3, 2), np.float32)})),
        build_golden(replace(GOLDEN, inputs=GOLDEN.inputs | {"x": np.zeros(3, np.float32)})),
        build_golden(replace(GOLDEN, inputs=GOLDEN.inputs | {"name": np.zeros(2)})),
    ],
)
def test_what_holds_none_of_this_version_is_one_named_error(data: bytes) -> None:
    with pytest.raises(MalformedError, match="golden samples: "):
        parse_golden(data, MANIFEST)


@given(st.binary(max_size=200))
def test_hostile_bytes_are_one_named_error(data: bytes) -> None:
    for hostile in (data, zstandard.compress(data)):
        with pytest.raises(MalformedError):
            parse_golden(hostile, MANIFEST)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"y": [[0.1, 4.2, 1], [9.1, 0, 1.2]]}, None),  # another processor rounds otherwise
        ({"y": [[0, 4, 1], [9, 0, 4]]}, "strays by 0.156 of its spread"),
        ({"y": [[0, np.nan, 1], [9, 0, 1]]}, "strays by nan"),
        ({"y": [[0, 4, 1], [np.inf, 0, 1]]}, "strays by inf"),
        ({"label": [1, 2]}, "'label' of the golden samples is another one"),
    ],
)
def test_answers_are_the_golden_ones_but_for_rounding(changes: dict[str, list[float]], said: str | None) -> None:
    answers = dict(GOLDEN.outputs) | {name: np.array(values) for name, values in changes.items()}
    reason = explain_straying(GOLDEN, answers)
    assert reason is None if said is None else said in str(reason)


def test_row_whose_largest_value_is_elsewhere_strays_unless_the_two_are_as_good_as_equal() -> None:
    far = np.tile(np.array([[0.0, 4, 1]]), (100, 1))
    golden = replace(GOLDEN, outputs={"y": far})
    wrong = far.copy()
    wrong[7] = [4, 0, 1]
    assert "at another place in 1 of 100" in str(explain_straying(golden, {"y": wrong}))
    near = far.copy()
    near[7] = [3.9, 4, 1]
    golden = replace(GOLDEN, outputs={"y": near})
    wrong = near.copy()
    wrong[7] = [4, 3.9, 1]
    assert explain_straying(golden, {"y": wrong}) is None
