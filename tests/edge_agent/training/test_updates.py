import numpy as np
import pytest

from edge_agent.errors import StalledError
from edge_agent.training.updates import UpdateStore
from tests.simulators.crash import crash_points, run_until_crash


def build_update(seed):
    return np.random.default_rng(seed).bytes(400)


def test_stored_update_comes_back_bit_for_bit_in_another_process(tmp_path):
    UpdateStore(tmp_path / "updates").save("run-1", 3, build_update(3))
    found = UpdateStore(tmp_path / "updates").find("run-1", 3)
    assert found == build_update(3)


def test_only_the_last_update_is_kept(tmp_path):
    store = UpdateStore(tmp_path)
    store.save("run-1", 1, build_update(1))
    store.save("run-1", 2, build_update(2))
    assert store.find("run-1", 1) is None
    assert store.find("run-2", 2) is None
    assert [path.name for path in tmp_path.iterdir()] == ["run-1.2.update"]


def test_other_runs_and_half_written_files_are_removed_at_the_start(tmp_path):
    store = UpdateStore(tmp_path)
    store.save("run.1", 2, build_update(1))
    (tmp_path / ".run.1.3.update.77.tmp").write_bytes(b"half")
    (tmp_path / "run.2.update").write_bytes(b"run named run, round 2")
    store.remove_other_runs("run.1")
    assert [path.name for path in tmp_path.iterdir()] == ["run.1.2.update"]
    store.remove_other_runs("run")
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StalledError, match="file"):
        UpdateStore(tmp_path / "file" / "updates")


def test_killed_while_storing_it_is_there_whole_or_not_at_all(tmp_path):
    for crash_at in crash_points():
        store = UpdateStore(tmp_path / str(crash_at))
        store.save("run-1", 1, build_update(1))

        def save(tell, store=store):
            store.save("run-1", 2, build_update(2))
            tell("saved")

        outcome = run_until_crash(save, crash_at=crash_at)
        found = store.find("run-1", 2)
        assert found is None or found == build_update(2)
        assert found is not None or not outcome.told
        if not outcome.crashed:
            break
    assert crash_at > 4
