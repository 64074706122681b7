"""Files are read row by row, whatever their size, or refused with the place that is wrong."""

import datetime as dt
import subprocess
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.errors import RequestError
from edge_agent.samples.rows import read_rows
from tests.simulators.agent import REPOSITORY


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def rows(path: Path) -> list:
    return [row for _, row in read_rows(path)]


def test_csv_with_a_header_keeps_its_cells_as_text(tmp_path: Path) -> None:
    path = write(tmp_path, "s.csv", '\ufeffage, town\n1,"A, B"\n\n,x\n')
    assert rows(path) == [{"age": "1", "town": "A, B"}, {"age": "", "town": "x"}]


def test_csv_without_a_header_holds_numbers(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "s.csv", "1,2.5\n3,-4e1\n")) == [[1, 2.5], [3, -40.0]]


def test_json_lines_hold_objects_or_lists(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "s.jsonl", '{"a": null}\n\n[1, [2]]\n')) == [{"a": None}, [1, [2]]]


def test_parquet_values_are_as_json_would_hold_them(tmp_path: Path) -> None:
    values = {
        "n": [1, None],
        "s": ["x", ""],
        "d": [dt.date(2026, 11, 24)] * 2,
        "m": [Decimal("0.5")] * 2,
        "l": [[1.5]] * 2,
    }
    pq.write_table(pa.table(values), tmp_path / "s.parquet")
    assert rows(tmp_path / "s.parquet") == [
        {"n": 1, "s": "x", "d": "2026-11-24", "m": "0.5", "l": [1.5]},
        {"n": None, "s": "", "d": "2026-11-24", "m": "0.5", "l": [1.5]},
    ]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_blocks(tmp_path: Path, save: object) -> None:
    x, town = np.arange(300_000.0).reshape(-1, 3), np.array(["ä", "bc"] * 50_000)
    save(tmp_path / "s.npz", x=x, town=town)
    read = rows(tmp_path / "s.npz")
    assert len(read) == 100_000
    assert read[99_999] == {"x": [299_997.0, 299_998.0, 299_999.0], "town": "bc"}
    np.testing.assert_array_equal([row["x"] for row in read], x)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.zeros((3_000_000, 10)), y=np.zeros(3_000_000))  # 264 MB
    code = (
        "import resource, sys; from pathlib import Path; from edge_agent.samples.rows import read_rows\n"
        "rows = read_rows(Path(sys.argv[1])); next(rows)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(100_000): next(rows)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.npz")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(shown.stdout) < 8 * 1024  # KiB


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("s.txt", "", r"\*\.parquet"),
        ("s.npz", "not a zip", "no npz"),
        ("s.parquet", "not parquet", "no readable Parquet"),
        ("s.jsonl", "1\n", r"s\.jsonl:1: expected an object"),
        ("s.jsonl", "[]\n{\n", r"s\.jsonl:2: not JSON"),
        ("s.jsonl", "[" * 100_000, "not JSON"),
        ("s.csv", "1,2\n1\n", r"s\.csv:2: 1 columns, expected 2"),
        ("s.csv", "1,2\n1,x\n", r"s\.csv:2: expected finite numbers"),
        ("s.csv", "1,2\n1,nan\n", r"s\.csv:2: expected finite numbers"),
        ("s.csv", "a,a\n1,2\n", r"s\.csv:1: a column's name comes twice"),
        ("s.csv", "a\n" + "x" * 200_000, "field larger"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        rows(write(tmp_path, name, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        rows(tmp_path / "s.csv")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(b"1,2\n\xff,1\n")
    with pytest.raises(RequestError, match="UTF-8"):
        rows(tmp_path / "s.csv")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros(2), "y": np.zeros(3)}, "one row of each array a sample, got x"),
        ({"x": np.zeros(())}, "no npz file of plain arrays"),
        ({"x": np.array([{}])}, "no npz file of plain arrays"),
        ({"x": np.zeros((2, 2), order="F")}, "Fortran order"),
        ({}, "no arrays"),
    ],
)
def test_npz_without_rows_is_refused_and_never_unpickled(tmp_path: Path, arrays: dict, said: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(RequestError, match=said):
        rows(tmp_path / "s.npz")


def test_npz_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.zeros(4))
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "s.npz", "w") as bad:
        bad.writestr("x.npy", good.read("x.npy")[:-8])
    with pytest.raises(RequestError, match="ends before its last row"):
        rows(tmp_path / "s.npz")


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None; sys.modules['pyarrow.parquet'] = None\n"
        "from edge_agent.__main__ import main; sys.exit(main(['ingest', 's.parquet', '--uds', 'nowhere']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "pip install 'edge-fl[parquet]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
