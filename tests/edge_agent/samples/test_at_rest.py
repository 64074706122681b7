"""What a thief of the disk finds, what is left of a sample that was forgotten, and how an unsealed store becomes sealed."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import RequestError, StalledError, TransientError
from edge_agent.samples.keeper import SampleKeeper
from edge_agent.samples.sealing import SealError
from edge_agent.samples.store import Retention, SampleStore, open_samples
from models.tensors.spec import TensorSpec
from tests.simulators.small_disk import fill_disk, mounted_disk
from tests.simulators.unsealed import save_unsealed

REPOSITORY = Path(__file__).parents[3]
KEY, OTHER_KEY = bytes(range(32)), bytes(32)
X, Y = TensorSpec("x", ("batch", 100), "float32"), TensorSpec("y", ("batch",), "float32")
LABEL = 0.7316  # no constant of anything else


def open_store(
    directory: Path, key: bytes | None = KEY, *, model: str = "m", clock=lambda: 1e9, **limits
) -> SampleStore:
    return open_samples(directory / "samples.db", model=model, key=key, retention=Retention(**limits), clock=clock)


def sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(number)
    return generator.normal(size=100).astype(np.float32), np.float32(LABEL + number).reshape(())


def read_files(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.iterdir()))


def find_sealed(directory: Path) -> dict[int, bytes]:
    connection = sqlite3.connect(directory / "samples.db")
    found = dict(connection.execute("SELECT row, sealed FROM records"))
    connection.close()
    return found


def is_there(numbers: Iterator[int] | range, data: bytes) -> bool:
    return any(part.tobytes() in data for number in numbers for part in sample(number))


def test_stolen_files_hold_no_value_no_label_and_no_field(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(n) for n in range(5)], [{"patient": "Ada-Secret"}] * 5)
        stolen = read_files(tmp_path)
    stolen += read_files(tmp_path)
    assert not is_there(range(5), stolen)
    for text in (b"Secret", b"patient", b"float32", KEY):
        assert text not in stolen


def test_another_key_or_none_opens_nothing_and_says_so_in_one_line(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(1)])
    with pytest.raises(SealError, match=r"samples\.db is sealed with another key.*edge-agent forget --all") as refused:
        open_store(tmp_path, OTHER_KEY)
    assert "\n" not in str(refused.value)
    with open_store(tmp_path, None) as store:
        assert store.count() == 1
        for ask in (lambda: store.load(X, Y), lambda: store.find(lambda _: True), lambda: store.add([sample(2)])):
            with pytest.raises(SealError, match="key has not been given"):
                ask()


@pytest.mark.parametrize("change", ["swap rows", "younger", "other model", "one bit"])
def test_record_that_was_moved_or_changed_does_not_open(tmp_path: Path, change: str) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(1), sample(2)])
    connection = sqlite3.connect(tmp_path / "samples.db")
    with connection:
        if change == "swap rows":
            connection.execute("UPDATE records SET row = 3 - row + 10")
        elif change == "younger":
            connection.execute("UPDATE records SET kept_s = kept_s + 1")
        elif change == "other model":
            connection.execute("UPDATE records SET model = 'n'")
        else:
            sealed = bytearray(connection.execute("SELECT sealed FROM records WHERE row = 1").fetchone()[0])
            sealed[40] ^= 1
            connection.execute("UPDATE records SET sealed = ? WHERE row = 1", (bytes(sealed),))
    connection.close()
    with (
        open_store(tmp_path, model="n" if change == "other model" else "m") as store,
        pytest.raises(SealError, match="does not open"),
    ):
        store.load(X, Y)


def test_samples_of_another_model_are_counted_and_not_trained_on(tmp_path: Path) -> None:
    with open_store(tmp_path, model="old") as store:
        store.add([sample(1)])
    with open_store(tmp_path) as store:
        store.add([sample(2)])
        assert store.count() == 2
        assert store.load(X, Y)[1].tolist() == [sample(2)[1]]


def test_no_two_records_share_a_nonce_and_no_number_is_given_twice(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(1)] * 50)
        nonces = {sealed[:12] for sealed in find_sealed(tmp_path).values()}
        assert len(nonces) == 50
        store.forget()
        assert store.add([sample(1)]) == [51]


def test_forgotten_bytes_are_in_no_file_and_the_rest_is_untouched(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, open_store(tmp_path) as training:
        store.add([sample(n) for n in range(40)] + [(np.ones(20_000, np.float32), np.array(1))])
        before = find_sealed(tmp_path)
        gone = [3, 4, 20, 41]  # the last is larger than a page
        assert all(before[row][-600:] in read_files(tmp_path) for row in gone[:3])
        assert store.forget([*gone, 1000]) == 4
        data = read_files(tmp_path)
        for row in gone:
            sealed = before[row]
            assert not any(sealed[start : start + 16] in data for start in range(0, len(sealed) - 16, 16)), row
        assert os.path.getsize(tmp_path / "samples.db-wal") == 0  # noqa: PTH202
        assert training.load(X, Y)[1].tolist() == [sample(n)[1] for n in range(40) if n + 1 not in gone]
        assert {row: sealed for row, sealed in before.items() if row not in gone} == find_sealed(tmp_path)


def test_a_reader_that_holds_the_log_keeps_traces_and_that_is_said_until_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.samples.database.BUSY_TIMEOUT_S", 0.05)
    with open_store(tmp_path) as store:
        store.add([sample(1), sample(2)])
        sealed = find_sealed(tmp_path)[1]
        reader = sqlite3.connect(tmp_path / "samples.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM records").fetchone()
        with pytest.raises(TransientError, match="another process is reading"):
            store.forget([1])
        reader.close()
        store.forget([1])
        store.forget_old()
        assert sealed[:16] not in read_files(tmp_path)


def test_all_are_forgotten_without_the_key_and_another_key_takes_its_place(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.add([sample(1), sample(2)])
    sealed = find_sealed(tmp_path)
    with open_store(tmp_path, None) as store:
        assert store.forget() == 2
    assert not any(data[:16] in read_files(tmp_path) for data in sealed.values())
    with open_store(tmp_path, OTHER_KEY) as store:
        assert store.add([sample(3)]) == [3]
        assert len(store.load(X, Y)[0]) == 1


def test_samples_leave_when_they_are_too_old_at_the_next_write_and_without_one(tmp_path: Path) -> None:
    now_s = 1e9
    with open_store(tmp_path, clock=lambda: now_s, keep_s=86_400) as store:
        store.add([sample(1)])
        now_s += 86_000
        store.add([sample(2)])
        assert (store.forget_old(), store.count()) == (0, 2)
        now_s += 500
        assert store.add([sample(3)]) == [3]
        assert store.count() == 2
        sealed = find_sealed(tmp_path)
        now_s += 86_000
        assert store.forget_old() == 1
        assert sealed[2][:16] not in read_files(tmp_path)
        assert store.load(X, Y)[1].tolist() == [sample(3)[1]]


def test_oldest_give_way_where_the_owner_wants_it(tmp_path: Path) -> None:
    with open_store(tmp_path, max_count=3, forgets_oldest=True) as store:
        store.add([sample(1), sample(2)])
        store.add([sample(3), sample(4)])
        assert store.load(X, Y)[1].tolist() == [sample(n)[1] for n in (2, 3, 4)]
        with pytest.raises(RequestError, match="at most 3"):
            store.add([sample(5)] * 4)
        assert store.count() == 3


def test_unsealed_store_is_sealed_when_it_is_opened_and_keeps_its_ids(tmp_path: Path) -> None:
    save_unsealed(tmp_path / "samples.db", [sample(n) for n in range(1, 31)])
    assert is_there(range(1, 31), read_files(tmp_path))
    with open_store(tmp_path) as store:
        assert not is_there(range(1, 31), read_files(tmp_path))
        x, y = store.load(X, Y)
        np.testing.assert_array_equal(x, np.stack([sample(n)[0] for n in range(1, 31)]))
        np.testing.assert_array_equal(y, [sample(n)[1] for n in range(1, 31)])
        assert store.add([sample(31)]) == [31]
        assert store.forget([1]) == 1
    with open_store(tmp_path) as store:
        assert store.count() == 30


MIGRATION = """
import os, sqlite3, sys
from pathlib import Path
from edge_agent.samples import database, store
steps = int(sys.argv[2])
def die(statement):
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), 9)
connect = database.connect
def traced(path):
    connection = connect(path)
    connection.set_trace_callback(die)
    return connection
store.connect = traced
store.open_samples(Path(sys.argv[1]), model="m", key=bytes(range(32))).close()
"""


def test_sealing_that_is_killed_at_any_statement_loses_nothing_and_ends_sealed(tmp_path: Path) -> None:
    steps, returned = 0, -signal.SIGKILL
    while returned == -signal.SIGKILL:
        directory = tmp_path / str(steps)
        directory.mkdir()
        save_unsealed(directory / "samples.db", [sample(n) for n in range(1, 4)])
        returned = subprocess.run(
            [sys.executable, "-c", MIGRATION, str(directory / "samples.db"), str(steps)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            check=False,
        ).returncode
        with open_store(directory) as store:
            assert store.load(X, Y)[1].tolist() == [sample(n)[1] for n in range(1, 4)]
            assert not is_there(range(1, 4), read_files(directory))
        steps += 1
    assert returned == 0
    assert steps > 10  # it was killed in the middle, not only before


FULL_WRITER = """
import sys
import numpy as np
from pathlib import Path
from edge_agent.samples.store import open_samples
with open_samples(Path(sys.argv[1]), model="m", key=bytes(range(32))) as store:
    while True:
        print(store.add([(np.full(500, 7.0), np.array(1.0))] * 4)[-1], flush=True)
"""


def fill_store(store: SampleStore, ids: list[int]) -> None:
    while True:
        ids += store.add([(np.full(500, 7.0), np.array(1.0))] * 4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path, size_mb=2) as disk:
        yield disk


@pytest.mark.parametrize("opened", ["before it was full", "afterwards"])
def test_samples_are_forgotten_on_a_disk_without_a_free_byte(small_disk: Path, opened: str) -> None:
    store = open_store(small_disk)
    ids: list[int] = []
    with pytest.raises(RequestError, match="cannot be kept") as refused:
        fill_store(store, ids)
    assert refused.value.status == 507
    assert len(ids) > 50
    if opened == "afterwards":
        store.close()
    fill_disk(small_disk)
    if opened == "afterwards":
        store = open_keeper(small_disk)
    assert store.count() in (len(ids), None)
    assert store.forget(ids[:10]) == 10
    assert store.forget(None) == len(ids) - 10
    assert store.count() == 0
    assert (small_disk / "samples.db").stat().st_size < 64 * 1024  # the disk has its room back
    assert store.add([sample(1)])
    store.close()


def open_keeper(directory: Path) -> SampleKeeper:
    return SampleKeeper(directory / "samples.db", model="m", load_key=lambda _: KEY, retention=Retention())


def test_writer_killed_on_a_full_disk_leaves_what_it_acknowledged(small_disk: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", FULL_WRITER, str(small_disk / "samples.db")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert writer.stdout is not None
    for _ in range(20):
        acknowledged = int(writer.stdout.readline())
    writer.kill()
    acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
    writer.wait()
    with open_store(small_disk) as store:
        assert store.count() >= acknowledged
        assert len(store.load(TensorSpec("x", ("batch", 500), "float32"), Y)[0]) == store.count()


def test_unsealed_store_is_not_touched_without_a_key_but_to_forget_all_of_it(tmp_path: Path) -> None:
    save_unsealed(tmp_path / "samples.db", [sample(n) for n in range(1, 31)])
    with open_store(tmp_path, None) as store:
        assert store.count() == 30
        with pytest.raises(StalledError, match="earlier release"):
            store.forget([1])
        assert store.forget() == 30
        assert not is_there(range(1, 31), read_files(tmp_path))
        assert store.count() == 0
    with open_store(tmp_path, KEY) as store:
        assert store.add([sample(31)]) == [31]


def test_agent_that_looks_for_old_samples_seals_those_of_an_earlier_release(tmp_path: Path) -> None:
    save_unsealed(tmp_path / "samples.db", [sample(1)])
    keeper = open_keeper(tmp_path)
    assert (keeper.forget_old(), keeper.count()) == (0, 1)
    assert not is_there(range(1, 2), read_files(tmp_path))
    keeper.close()


def test_file_that_is_damaged_while_it_is_open_is_an_error_that_its_users_know(tmp_path: Path) -> None:
    path = tmp_path / "samples.db"
    keeper = open_keeper(tmp_path)
    with open_store(tmp_path) as store:
        keeper.add([sample(1)])
        sqlite3.connect(path).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with path.open("r+b") as file:
            file.seek(len(b"SQLite format 3\0"))
            file.write(b"\xff" * path.stat().st_size)
        for ask in (
            lambda: store.has_key,
            store.count,
            store.forget_old,
            lambda: store.find(bool),
            lambda: store.load(X, Y),
        ):
            with pytest.raises(StalledError, match=r"samples\.db"):
                ask()
        assert keeper.count() is None
        with pytest.raises(StalledError):
            keeper.forget_old()
        with pytest.raises(TransientError, match="not everything"):
            keeper.forget(None)
    keeper.close()
