import numpy as np
import pytest

from fl_server.rounds.spool import UPDATES_NAME, Spool, discard_updates, list_spooled


def test_spool_gives_back_what_was_added_after_a_restart(tmp_path):
    updates = {name: np.arange(5, dtype=np.float32) * number for number, name in enumerate(("a", "b", "c.d"))}
    spool = Spool(tmp_path / "updates", 5)
    for name, update in updates.items():
        assert spool.add(name, update)
    again = Spool(tmp_path / "updates", 5)
    assert again.devices == set(updates)
    np.testing.assert_array_equal(sorted(map(tuple, again.read())), sorted(map(tuple, updates.values())))


def test_second_update_of_a_device_in_a_round_is_ignored(tmp_path):
    spool = Spool(tmp_path / "updates", 2)
    assert spool.add("a", np.ones(2, np.float32))
    assert not spool.add("a", np.full(2, 9, np.float32))
    assert not Spool(tmp_path / "updates", 2).add("a", np.full(2, 9, np.float32))
    assert [update.tolist() for update in spool.read()] == [[1, 1]]


def test_torn_or_foreign_files_do_not_count(tmp_path):
    spool = Spool(tmp_path / "updates", 3)
    spool.add("whole", np.ones(3, np.float32))
    (tmp_path / "updates" / "torn.f32").write_bytes(b"\0" * 5)
    (tmp_path / "updates" / ".killed.f32.123.tmp").write_bytes(b"\0" * 12)
    again = Spool(tmp_path / "updates", 3)
    assert again.devices == {"whole"}
    assert len(list(again.read())) == 1


def test_cleared_spool_leaves_nothing_on_disk(tmp_path):
    spool = Spool(tmp_path / "updates", 1)
    spool.add("a", np.ones(1, np.float32))
    spool.clear()
    assert not (tmp_path / "updates").exists()
    assert not spool.devices


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden"])
def test_device_id_cannot_leave_the_spool(tmp_path, name):
    spool = Spool(tmp_path / "updates", 1)
    with pytest.raises(ValueError, match="device id"):
        spool.add(name, np.ones(1, np.float32))
    assert list(tmp_path.rglob("*.f32")) == []


def test_columns_are_those_of_every_whole_update_in_one_order(tmp_path):
    spool = Spool(tmp_path / "updates", 7)
    for number, name in enumerate(("c", "a", "b")):
        spool.add(name, np.arange(7, dtype=np.float32) + 10 * number)
    (tmp_path / "updates" / "torn.f32").write_bytes(b"\0" * 5)
    parts = [spool.read_columns(start, stop) for start, stop in ((0, 3), (3, 4), (4, 7))]
    np.testing.assert_array_equal(np.hstack(parts), np.array(list(spool.read())))


def test_updates_of_a_run_that_was_given_up_are_gone_and_whose_they_were_is_known(tmp_path):
    directory = tmp_path / "rounds" / "0002" / UPDATES_NAME
    directory.mkdir(parents=True)
    Spool(directory, 2).add("a", np.full(2, 7, np.float32))
    discard_updates(tmp_path)
    assert list_spooled(directory) == {"a"}
    assert [path.stat().st_size for path in directory.iterdir()] == [0]
    assert list(Spool(directory, 2).read()) == []
