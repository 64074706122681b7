"""Samples are kept whole, private and through a SIGKILL."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import RequestError, StalledError
from edge_agent.samples.store import Retention, SampleStore, open_samples
from models.tensors.spec import TensorSpec
from tests.simulators.waiting import wait_until

REPOSITORY = Path(__file__).parents[3]
X = TensorSpec("x", ("batch", 3), "float32")
LABEL = TensorSpec("y", ("batch",), "int64")


KEY = bytes(32)


def open_store(directory: Path, key: bytes | None = KEY, *, model: str = "m", **limits) -> SampleStore:
    return open_samples(directory / "samples.db", model=model, key=key, retention=Retention(**limits))


def sample(value: float, label: object = 1) -> tuple[np.ndarray, np.ndarray]:
    return np.full(3, value), np.array(label)


def test_samples_come_back_in_order_in_the_dtype_asked_for(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        ids = store.add([sample(0.5, 1), (np.array([1, 2, 3], np.uint8), np.array(2.0)), sample(0.25, 3)])
        x, y = store.load(X, LABEL)
    assert ids == [1, 2, 3]
    np.testing.assert_array_equal(x, np.array([[0.5] * 3, [1, 2, 3], [0.25] * 3], np.float32))
    np.testing.assert_array_equal(y, [1, 2, 3])
    assert (x.dtype, y.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    "misfit",
    [
        (np.zeros(4), np.array(1)),  # another row shape
        (np.zeros((1, 3)), np.array(1)),
        (np.zeros(3), np.array([1])),
        (np.zeros(3), np.array(1.5)),  # no integer
        (np.full(3, 1e300), np.array(1)),  # beyond float32
        (np.full(3, np.nan), np.array(1)),
    ],
)
def test_samples_that_do_not_fit_are_skipped(tmp_path: Path, misfit: tuple[np.ndarray, np.ndarray]) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(1.0), misfit, sample(2.0)])
        assert store.count() == 3
        x, y = store.load(X, LABEL)
    np.testing.assert_array_equal(x[:, 0], [1, 2])
    assert y.shape == (2,)


def test_empty_store_gives_empty_arrays_of_the_right_shape(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        x, y = store.load(X, TensorSpec("y", ("batch", 2), "float32"))
    assert (x.shape, y.shape) == ((0, 3), (0, 2))


def test_dtype_no_model_takes_is_refused_and_nothing_of_the_batch_is_kept(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(RequestError, match="complex128"):
            store.add([sample(1.0), (np.zeros(3, complex), np.array(1))])
        assert store.count() == 0


def test_full_store_refuses_the_whole_batch(tmp_path: Path) -> None:
    with open_store(tmp_path, max_count=3) as store:
        store.add([sample(1.0)] * 2)
        with pytest.raises(RequestError, match="at most 3") as refused:
            store.add([sample(1.0)] * 2)
        assert refused.value.status == 507
        assert store.count() == 2


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(1.0)])
        for path in tmp_path.iterdir():
            assert path.stat().st_mode & 0o077 == 0, path


def test_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.db").write_bytes(b"x" * 5000)
    with pytest.raises(StalledError, match=r"samples\.db"):
        open_store(tmp_path)
    with pytest.raises(StalledError, match="no"):
        open_store(tmp_path / "no")


def test_commits_are_synced_and_deleted_bytes_overwritten(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        settings = [
            store._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "secure_delete")
        ]
    assert settings == ["wal", 2, 1]


def test_another_process_sees_samples_while_the_store_is_open(tmp_path: Path) -> None:
    with open_store(tmp_path) as ours, open_store(tmp_path) as theirs:
        ours.add([sample(1.0)])
        theirs.add([sample(2.0)])
        assert ours.count() == theirs.count() == 2


WRITER = """
import sys
import numpy as np
from pathlib import Path
from edge_agent.samples.store import Retention, open_samples
with open_samples(Path(sys.argv[1]), model="m", key=bytes(32)) as store:
    while True:
        print(store.add([(np.full(300, 7.0), np.array(1))] * 3)[-1], flush=True)
"""


def test_acknowledged_samples_survive_the_kill_of_their_writer(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "samples.db", 0
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert writer.stdout is not None
        for _ in range(20):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        writer.wait()
        with open_store(tmp_path) as store:
            assert store.count() >= acknowledged
            assert store.count() % 3 == 0
            assert len(store.load(TensorSpec("x", ("batch", 300), "float32"), LABEL)[0]) == store.count()


def test_writer_waits_for_another_that_is_committing(tmp_path: Path) -> None:
    path = tmp_path / "samples.db"
    with open_store(tmp_path) as store:
        holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        holder.execute("BEGIN IMMEDIATE")
        adding = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert store.count() == 0
        holder.execute("COMMIT")
        holder.close()
        wait_until(lambda: store.count() >= 3, "the waiting writer")
        adding.kill()
        adding.communicate()
