"""Local parameters on the disk: sealed, of one architecture, and gone with what the owner forgets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import StalledError
from edge_agent.samples.cipher import open_cipher
from edge_agent.training.local import LocalParameters, forget_local, load_initial
from models.contract.manifest import LOCAL_NAME
from models.contract.privacy import Unit
from tests.simulators.step_graph import build_step_graph, build_step_manifest, save_step_version

GRAPH = build_step_graph()
INITIAL = np.array([0.25], np.float32)
MOVED = np.array([1, 2, 3, 4], np.float32)


def open_local(directory: Path, *, graph: bytes = GRAPH, key: bytes = bytes(32)) -> LocalParameters:
    return LocalParameters(directory, build_step_manifest(graph, local=True), INITIAL, open_cipher(key))


def test_shared_and_local_parameters_come_apart_and_together(tmp_path: Path) -> None:
    local = open_local(tmp_path)
    begun = local.begin("run-1", 1, Unit.SAMPLE)
    whole = local.join(np.array([7, 8, 9], np.float32), begun)
    np.testing.assert_array_equal(whole, [7, 8, 9, 0.25])
    np.testing.assert_array_equal(local.keep("run-1", 1, Unit.SAMPLE, begun=begun, moved=MOVED), [1, 2, 3])
    np.testing.assert_array_equal(open_local(tmp_path).begin("run-2", 1, Unit.SAMPLE), [4.25])


def test_another_architecture_another_key_or_damage_begins_with_the_versions_own(tmp_path: Path) -> None:
    local = open_local(tmp_path)
    local.keep("run-1", 1, Unit.SAMPLE, begun=local.begin("run-1", 1, Unit.SAMPLE), moved=MOVED)
    (path,) = (tmp_path / "local").iterdir()
    sealed = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert np.array([4.25], "<f4").tobytes() not in sealed
    assert open_local(tmp_path, graph=build_step_graph(batch=4)).begin("run-2", 1, Unit.SAMPLE) == INITIAL
    assert open_local(tmp_path, key=bytes([1] * 32)).begin("run-2", 1, Unit.SAMPLE) == INITIAL
    for damaged in (b"", sealed[:-1], sealed[:20] + b"!" + sealed[21:]):
        path.write_bytes(damaged)
        assert local.begin("run-2", 1, Unit.SAMPLE) == INITIAL
    path.write_bytes(sealed)
    assert local.begin("run-2", 1, Unit.SAMPLE) == INITIAL + 4


def test_forgetting_takes_them_and_what_a_round_under_way_makes_of_them(tmp_path: Path) -> None:
    local = open_local(tmp_path)
    local.keep("run-1", 1, Unit.SAMPLE, begun=local.begin("run-1", 1, Unit.SAMPLE), moved=MOVED)
    begun = local.begin("run-1", 2, Unit.SAMPLE)
    forget_local(tmp_path)
    np.testing.assert_array_equal(local.keep("run-1", 2, Unit.SAMPLE, begun=begun, moved=MOVED), MOVED[:3])
    assert list(tmp_path.iterdir()) == []
    assert local.begin("run-1", 3, Unit.SAMPLE) == INITIAL
    forget_local(tmp_path / "never trained")


@pytest.mark.parametrize(("learnt", "asked"), [(Unit.DEVICE, Unit.SAMPLE), (Unit.SAMPLE, Unit.DEVICE)])
def test_what_was_learnt_under_one_unit_is_no_start_for_the_other(tmp_path: Path, learnt: Unit, asked: Unit) -> None:
    local = open_local(tmp_path)
    local.keep("run-1", 1, learnt, begun=local.begin("run-1", 1, learnt), moved=MOVED)
    assert open_local(tmp_path).begin("run-2", 1, learnt) == INITIAL + 4
    assert open_local(tmp_path).begin("run-2", 1, asked) == INITIAL


def test_model_that_is_the_same_everywhere_leaves_no_file(tmp_path: Path) -> None:
    manifest = build_step_manifest(GRAPH)
    local = LocalParameters(tmp_path, manifest, load_initial(tmp_path, manifest), open_cipher(bytes(32)))
    begun = local.begin("run-1", 1, Unit.SAMPLE)
    assert local.join(MOVED, begun) is MOVED
    assert local.keep("run-1", 1, Unit.SAMPLE, begun=begun, moved=MOVED) is MOVED
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [None, b"", bytes(4), bytes(8)])
def test_version_without_the_values_that_its_manifest_names_is_not_trained(tmp_path: Path, data: bytes | None) -> None:
    manifest = save_step_version(tmp_path, GRAPH, local=True)
    assert load_initial(tmp_path, manifest) == INITIAL
    (tmp_path / LOCAL_NAME).unlink()
    if data is not None:
        (tmp_path / LOCAL_NAME).write_bytes(data)
    with pytest.raises(StalledError, match=LOCAL_NAME):
        load_initial(tmp_path, manifest)
    assert manifest.training is not None
    assert load_initial(tmp_path, replace(manifest, training=replace(manifest.training, local=()))).size == 0
