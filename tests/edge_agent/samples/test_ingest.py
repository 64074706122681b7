"""Files of samples are read, or refused with the line that is wrong."""

from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import RequestError
from edge_agent.samples.ingest import read_samples


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_npz_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.arange(4.0).reshape(2, 2), y=np.array([0, 1]))
    assert list(read_samples(tmp_path / "s.npz")) == [([0.0, 1.0], 0), ([2.0, 3.0], 1)]


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "s.jsonl", '{"x": [1, 2], "y": 0}\n\n{"x": [3, 4], "y": 1}\n')
    assert list(read_samples(path)) == [([1, 2], 0), ([3, 4], 1)]


@pytest.mark.parametrize("header", ["", "a,b,target\n"])
def test_csv_with_and_without_a_header(tmp_path: Path, header: str) -> None:
    path = write(tmp_path, "s.csv", header + "1,2.5,0\n3,4,1\n")
    assert list(read_samples(path)) == [([1, 2.5], 0), ([3, 4], 1)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("s.txt", "", r"\*\.npz"),
        ("s.npz", "not a zip", "no npz"),
        ("s.jsonl", '{"x": 1}\n', r"s\.jsonl:1: expected"),
        ("s.jsonl", '{"x": 1, "y": 2}\n[]\n', r"s\.jsonl:2: expected"),
        ("s.jsonl", "{\n", r"s\.jsonl:1: not JSON"),
        ("s.csv", "1,2\n1\n", r"s\.csv:2: 1 columns"),
        ("s.csv", "1\n2\n", "columns"),
        ("s.csv", "1,2\n1,x\n", r"s\.csv:2: expected finite numbers"),
        ("s.csv", "1,2\n1,nan\n", r"s\.csv:2: expected finite numbers"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        list(read_samples(write(tmp_path, name, text)))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        list(read_samples(tmp_path / "s.csv"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(b"1,2\n\xff,1\n")
    with pytest.raises(RequestError, match="UTF-8"):
        list(read_samples(tmp_path / "s.csv"))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros(2)}, "'y' is missing"),
        ({"x": np.zeros(2), "y": np.zeros(3)}, "one row of each"),
        ({"x": np.zeros(()), "y": np.zeros(())}, "one row of each"),
        ({"x": np.array([{}]), "y": np.zeros(1)}, "plain arrays"),
    ],
)
def test_npz_without_samples_is_refused_and_never_unpickled(tmp_path: Path, arrays: dict, said: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(RequestError, match=said):
        list(read_samples(tmp_path / "s.npz"))
