"""A file of any kind and size goes through a model; what kills it costs one batch, and changes nothing."""

import csv
import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.__main__ import main
from edge_agent.batch import infer_file
from edge_agent.errors import AgentError, RequestError
from edge_agent.predictors import LocalPredictor
from edge_agent.results import Journal, build_rows, find_writer
from models.tensors.features import Feature
from models.tensors.spec import TensorSpec
from tests.simulators.agent import REPOSITORY
from tests.simulators.tiny_models import save_version
from tests.simulators.waiting import wait_until

FEATURES = (Feature("age", impute=50, scale=(50, 10)), Feature("pain", one_hot=("no", "yes")), Feature("note", hash=1))
COLUMNS = ("age", "pain", "note")
RAW = [(str(20 + number), ("no", "yes", "maybe")[number % 3], "some text") for number in range(600)]


@pytest.fixture(scope="module")
def version_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("version")
    save_version(directory, features=FEATURES)
    return directory


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    save_version(directory, version=2)
    return directory


def infer(path: Path, output: Path, directory: Path) -> list[dict]:
    infer_file(path, output, LocalPredictor(directory, None))
    return [json.loads(line) for line in output.read_text().splitlines()]


def write_csv(path: Path, rows: list = RAW) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def expect(row: tuple[str, str, str]) -> float:
    age, pain, _ = row
    return float(np.float32((float(age) - 50) / 10)) + (pain != "maybe") + 1


def test_every_kind_of_input_gives_the_same_answers(tmp_path: Path, version_dir: Path) -> None:
    paths = [write_csv(tmp_path / "i.csv")]
    by_column = [dict(zip(COLUMNS, row, strict=True)) for row in RAW]
    paths.append(tmp_path / "i.jsonl")
    paths[-1].write_text("".join(json.dumps(row | {"age": int(row["age"])}) + "\n" for row in by_column))
    paths.append(tmp_path / "i.parquet")
    pq.write_table(pa.Table.from_pylist([row | {"age": float(row["age"])} for row in by_column]), paths[-1])
    paths.append(tmp_path / "i.npz")
    np.savez(paths[-1], **{name: np.array([row[name] for row in by_column]) for name in COLUMNS})
    answers = [infer(path, tmp_path / f"{path.suffix[1:]}.jsonl", version_dir) for path in paths]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert [row["row"] for row in answers[0]] == list(range(1, 601))
    np.testing.assert_allclose([row["logits"][0] for row in answers[0]], [expect(row) for row in RAW], rtol=1e-6)
    assert {row["label"] for row in answers[0]} == {"low"}


def test_every_kind_of_output_holds_the_same_answers(tmp_path: Path, version_dir: Path) -> None:
    path = write_csv(tmp_path / "i.csv")
    expected = infer(path, tmp_path / "o.jsonl", version_dir)
    for suffix in ("csv", "parquet", "npz"):
        infer_file(path, tmp_path / f"o.{suffix}", LocalPredictor(version_dir, None))
    assert pq.read_table(tmp_path / "o.parquet").to_pylist() == expected
    logits = np.array([row["logits"] for row in expected], np.float32)
    with np.load(tmp_path / "o.npz") as archive:
        assert set(archive.files) == {"label", "logits"}
        np.testing.assert_array_equal(archive["logits"], logits)
        assert archive["logits"].dtype == np.float32
        assert set(archive["label"]) == {"low"}
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert lines[0] == "row,label,logits_0,logits_1,logits_2"
    assert [line.split(",")[:2] for line in lines[1:3]] == [["1", "low"], ["2", "low"]]
    np.testing.assert_array_equal(
        [line.split(",")[2:] for line in lines[1:]], np.char.mod("%s", [r["logits"] for r in expected])
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".jsonl", ".npz", ".parquet"}


def test_model_without_features_takes_tensors_and_plain_columns(tmp_path: Path, plain_dir: Path) -> None:
    np.savez(tmp_path / "i.npz", x=np.arange(8.0).reshape(2, 4), y=np.zeros(2))
    (tmp_path / "i.csv").write_text("0,1,2,3\n4,5,6,7\n")
    (tmp_path / "i.jsonl").write_text('[0, 1, 2, 3]\n{"x": [4, 5, 6, 7]}\n')
    for name in ("npz", "csv", "jsonl"):
        rows = infer(tmp_path / f"i.{name}", tmp_path / f"{name}.jsonl", plain_dir)
        assert [row["logits"] for row in rows] == [[12] * 3, [44] * 3]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kept", [0, 1, 255, 256, 300, 511, 512, 600])
def test_what_a_journal_holds_is_not_asked_again(tmp_path: Path, version_dir: Path, kept: int) -> None:
    path, output = write_csv(tmp_path / "i.csv"), tmp_path / "o.csv"
    infer_file(path, tmp_path / "whole.csv", LocalPredictor(version_dir, None))
    predictor, asked = LocalPredictor(version_dir, None), []

    def die(_path: Path, _journal: Journal) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_agent.batch.find_writer", lambda *_: die)
        with pytest.raises(Killed):
            infer_file(path, output, predictor)
    journal = tmp_path / "o.csv.part"
    header, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(header + b"".join(lines[:kept]) + b'{"row": cut')
    answer = predictor.predict
    predictor.predict = lambda rows: asked.append(len(rows)) or answer(rows)
    summary = infer_file(path, output, predictor)
    assert summary.resumed == kept // 256 * 256
    assert sum(asked) == 600 - summary.resumed
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_killed_process_goes_on_where_it_ended_and_the_result_is_the_same(tmp_path: Path, plain_dir: Path) -> None:
    path, output = tmp_path / "i.csv", tmp_path / "o.csv"
    generator = np.random.default_rng(1)
    np.savetxt(path, generator.normal(size=(60_000, 4)), delimiter=",")
    command = [
        sys.executable,
        "-m",
        "edge_agent",
        "infer",
        "--input",
        str(path),
        "--version-dir",
        str(plain_dir),
        "--json",
    ]

    def start(to: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, "--output", str(to)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole.csv")
    assert json.loads(whole.communicate()[0])["resumed"] == 0
    journal, size_bytes = tmp_path / "o.csv.part", 0
    for _ in range(3):
        running = start(output)
        wait_until(lambda least=size_bytes: journal.exists() and journal.stat().st_size > least + 300_000, "more rows")
        running.send_signal(signal.SIGKILL)
        running.communicate()
        size_bytes = journal.stat().st_size
    assert not output.exists()
    last = start(output)
    summary = json.loads(last.communicate()[0])
    assert summary["rows"] == 60_000
    assert summary["resumed"] > 5_000
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not journal.exists()


def test_journal_of_another_input_or_version_is_refused(tmp_path: Path, version_dir: Path, plain_dir: Path) -> None:
    path, output = write_csv(tmp_path / "i.csv"), tmp_path / "o.csv"
    write_csv(path, [*RAW, ("old", "no", "x")])
    with pytest.raises(RequestError, match=r"i\.csv:602: column 'age': expected a finite number"):
        infer_file(path, output, LocalPredictor(version_dir, None))
    with pytest.raises(RequestError, match="another input or model version: remove it"):
        infer_file(path, output, LocalPredictor(plain_dir, None))
    write_csv(path)
    with pytest.raises(RequestError, match="another input or model version: remove it"):
        infer_file(path, output, LocalPredictor(version_dir, None))
    (tmp_path / "o.csv.part").unlink()
    assert infer_file(path, output, LocalPredictor(version_dir, None)).rows == 600
    with pytest.raises(RequestError, match="exists"):
        infer_file(path, output, LocalPredictor(version_dir, None))


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with Journal(tmp_path / "o.csv", {}, 1), pytest.raises(RequestError, match="another process"):
        Journal(tmp_path / "o.csv", {}, 1)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, plain_dir: Path) -> None:
    def measure(rows: int, suffix: str) -> int:
        path = tmp_path / f"i{rows}.npz"
        np.savez(path, x=np.ones((rows, 4), np.float32))
        predictor = LocalPredictor(plain_dir, None)
        tracemalloc.start()
        infer_file(path, tmp_path / f"o{rows}.{suffix}", predictor)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    for suffix in ("csv", "npz", "parquet"):
        assert measure(18_000, suffix) < 1.3 * measure(6_000, suffix), suffix


@pytest.mark.parametrize(
    ("name", "text", "output", "said"),
    [
        ("i.csv", "age,pain,note\n1,no,x\nold,no,x\n", "o.csv", r"i\.csv:3: column 'age': expected a finite number"),
        ("i.csv", "age,pain\n1,no\n", "o.csv", r"i\.csv:2: column 'note' is missing"),
        ("i.csv", "1,2,3,4\n", "o.csv", r"i\.csv:1: expected values by the names of their columns"),
        ("i.csv", "age,pain,note\n", "o.txt", r"expected a file named \*\.csv"),
        ("i.csv", "age,pain,note\n", "no/o.csv", "No such file"),
        ("i.txt", "", "o.csv", "expected a file named"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, version_dir: Path, name: str, text: str, output: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AgentError, match=said):
        infer_file(tmp_path / name, tmp_path / output, LocalPredictor(version_dir, None))
    assert not (tmp_path / output).exists()


def test_empty_file_gives_an_empty_result(tmp_path: Path, version_dir: Path) -> None:
    path = write_csv(tmp_path / "i.csv", [])
    for suffix in ("csv", "jsonl", "npz", "parquet"):
        assert infer_file(path, tmp_path / f"o.{suffix}", LocalPredictor(version_dir, None)).rows == 0
    assert (tmp_path / "o.csv").read_text() == "row,label,logits_0,logits_1,logits_2\n"
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 0


def test_outputs_of_every_form_reach_every_file(tmp_path: Path) -> None:
    specs = (
        TensorSpec("label", ("batch",), "string"),
        TensorSpec("half", ("batch", 2, 1), "float16"),
        TensorSpec("count", ("batch", 1), "uint64"),
    )
    outputs = {"label": ["a", "bcd"], "half": [[[0.5], [float("nan")]], [[1.0], [2.0]]], "count": [[1], [2**63]]}
    rows = build_rows(1, outputs, specs, ("x", "y"))
    with Journal(tmp_path / "o", {}, 1) as journal:
        journal.add(rows)
        for suffix in ("csv", "jsonl", "npz", "parquet"):
            find_writer(tmp_path / f"o.{suffix}", specs, ("x", "y"))(tmp_path / f"o.{suffix}", journal)
    assert (
        tmp_path / "o.csv"
    ).read_text() == "row,label,half_0,half_1,count_0\n1,a,0.5,,1\n2,bcd,1.0,2.0,9223372036854775808\n"
    assert pq.read_table(tmp_path / "o.parquet").to_pylist()[1] == {
        "row": 2,
        "label": "bcd",
        "half": [[1.0], [2.0]],
        "count": [2**63],
    }
    with np.load(tmp_path / "o.npz") as archive:
        assert archive["label"].tolist() == ["a", "bcd"]
        np.testing.assert_array_equal(archive["half"], np.array(outputs["half"], np.float16))
        assert archive["count"].tolist() == [[1], [2**63]]


def test_command_ends_with_one_line(tmp_path: Path, version_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "i.csv")
    arguments = ["infer", "--input", str(path), "--output", str(tmp_path / "o.csv"), "--version-dir", str(version_dir)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"600 rows of {path} are answered in {tmp_path / 'o.csv'}\n"
    assert main(arguments) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([*arguments[:-1], str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err
