"""Of each row, the target is found, and the rest is the input."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.errors import RequestError
from edge_agent.samples.ingest import read_inputs, read_samples


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_npz_of_inputs_and_targets(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.arange(4.0).reshape(2, 2), y=np.array([0, 1]))
    assert list(read_samples(tmp_path / "s.npz")) == [([0.0, 1.0], 0), ([2.0, 3.0], 1)]
    assert [x for _, x in read_inputs(tmp_path / "s.npz")] == [[0.0, 1.0], [2.0, 3.0]]


def test_npz_of_columns(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", age=np.array([7, 8]), town=np.array(["a", "b"]), y=np.array([0, 1]))
    assert list(read_samples(tmp_path / "s.npz")) == [({"age": 7, "town": "a"}, 0), ({"age": 8, "town": "b"}, 1)]


def test_json_lines_of_inputs_or_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path, "s.jsonl", '{"id": 9, "x": [1, 2], "y": 0}\n{"x": {"a": 3}, "y": "low"}\n{"a": 3, "y": [1]}\n'
    )
    assert list(read_samples(path)) == [([1, 2], 0), ({"a": 3}, "low"), ({"a": 3}, [1])]
    assert [x for _, x in read_inputs(path)] == [[1, 2], {"a": 3}, {"a": 3, "y": [1]}]


def test_last_column_of_csv_is_the_target_unless_another_is_named(tmp_path: Path) -> None:
    assert list(read_samples(write(tmp_path, "n.csv", "1,2.5,0\n3,4,1\n"))) == [([1, 2.5], 0), ([3, 4], 1)]
    path = write(tmp_path, "s.csv", "x,y,z\n1, low,0.5\n")
    assert list(read_samples(path)) == [({"x": "1", "y": " low"}, 0.5)]
    assert list(read_samples(path, "y")) == [({"x": "1", "z": "0.5"}, "low")]
    assert list(read_inputs(path)) == [(f"{path}:2", {"x": "1", "y": " low", "z": "0.5"})]


def test_parquet_of_columns_with_a_named_target(tmp_path: Path) -> None:
    pq.write_table(pa.table({"age": [7], "ill": [True]}), tmp_path / "s.parquet")
    assert list(read_samples(tmp_path / "s.parquet", "ill")) == [({"age": 7}, True)]


@pytest.mark.parametrize(
    ("name", "text", "target", "said"),
    [
        ("s.jsonl", '{"x": 1}\n', None, r"s\.jsonl:1: expected the target in 'y'"),
        ("s.jsonl", '{"x": 1, "y": null}\n', None, r"s\.jsonl:1: the target is missing"),
        ("s.jsonl", "[1]\n", None, "1 columns"),
        ("s.csv", "1\n2\n", None, "1 columns"),
        ("s.csv", "1,2\n", "y", "have no names"),
        ("s.csv", "a,b\n1,2\n", "y", "expected the target in 'y' and an input beside it, got columns a, b"),
        ("s.csv", "a,b\n1, \n", None, r"s\.csv:2: the target is missing"),
    ],
)
def test_row_that_is_no_sample_is_named(tmp_path: Path, name: str, text: str, target: str | None, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        list(read_samples(write(tmp_path, name, text), target))
