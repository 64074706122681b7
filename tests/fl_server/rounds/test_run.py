from decimal import Decimal

import numpy as np
import pytest

from fl_server.errors import RunError
from fl_server.rounds.run import (
    CHECKPOINT_NAME,
    PARAMETERS_NAME,
    SEQUENCE_NAME,
    build_round_dir,
    create_run,
    load_checkpoint,
    load_parameters,
    load_sequence,
    load_spec,
    save_checkpoint,
    save_sequence,
)
from tests.simulators.runs import LAYOUT, build_spec

START = np.arange(8, dtype=np.float32)


def save_round(run_dir, number, parameters):
    return save_checkpoint(
        run_dir, LAYOUT, parameters, number=number, accepted=("device-1",), missing=("device-2",), seconds=0.5
    )


def test_run_reads_back_as_it_was_created(tmp_path):
    create_run(tmp_path / "run", build_spec(), START)
    assert load_spec(tmp_path / "run") == build_spec()
    np.testing.assert_array_equal(load_parameters(tmp_path / "run", LAYOUT, 0), START)
    assert load_checkpoint(tmp_path / "run") is None


def test_newest_completed_round_is_found_again(tmp_path):
    create_run(tmp_path, build_spec(), START)
    for number in (1, 2, 9_999, 10_000, 10_001):
        checkpoint = save_round(tmp_path, number, START + number)
        assert load_checkpoint(tmp_path) == checkpoint
        np.testing.assert_array_equal(load_parameters(tmp_path, LAYOUT, number), START + number)


@pytest.mark.parametrize("damage", ["parameters lost", "parameters altered", "no checkpoint", "checkpoint torn"])
def test_round_that_was_not_written_to_its_end_has_not_happened(tmp_path, damage):
    create_run(tmp_path, build_spec(), START)
    save_round(tmp_path, 1, START + 1)
    save_round(tmp_path, 2, START + 2)
    directory = build_round_dir(tmp_path, 2)
    match damage:
        case "parameters lost":
            (directory / PARAMETERS_NAME).unlink()
        case "parameters altered":
            data = bytearray((directory / PARAMETERS_NAME).read_bytes())
            data[-1] ^= 1
            (directory / PARAMETERS_NAME).write_bytes(data)
        case "no checkpoint":
            (directory / CHECKPOINT_NAME).unlink()
        case "checkpoint torn":
            (directory / CHECKPOINT_NAME).write_bytes(b'{"round": 2, "para')
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.round == 1


@pytest.mark.parametrize("damage", ["parameters lost", "checkpoint torn"])
def test_round_that_was_seen_is_not_made_a_second_time_with_other_noise(tmp_path, damage):
    create_run(tmp_path, build_spec(), START)
    assert load_checkpoint(tmp_path, only_newest=True) is None
    save_round(tmp_path, 1, START)
    assert load_checkpoint(tmp_path, only_newest=True).round == 1
    save_round(tmp_path, 2, START)
    if damage == "parameters lost":
        (build_round_dir(tmp_path, 2) / PARAMETERS_NAME).unlink()
    else:
        (build_round_dir(tmp_path, 2) / CHECKPOINT_NAME).write_bytes(b"{")
    assert load_checkpoint(tmp_path).round == 1
    with pytest.raises(RunError, match="round 2 would be released a second time"):
        load_checkpoint(tmp_path, only_newest=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"quorum": 0},
        {"quorum": 3},
        {"devices": {}},
        {"devices": {"a/b": 1}},
        {"deadline_s": 0.0},
        {"update_norm_limit": Decimal("NaN")},
        {"update_norm_limit": Decimal(0)},
        {"graph_digest": "x"},
    ],
)
def test_run_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=r"."):
        build_spec(**changes)


def test_unreadable_run_says_which_file(tmp_path):
    with pytest.raises(RunError, match=r"run\.json"):
        load_spec(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"run\.json"):
        load_spec(tmp_path)
    (tmp_path / "rounds" / "0000").mkdir(parents=True)
    (tmp_path / "rounds" / "0000" / PARAMETERS_NAME).write_bytes(b"junk")
    with pytest.raises(RunError, match="safetensors"):
        load_parameters(tmp_path, LAYOUT, 0)


def test_sequences_that_were_used_up_stay_so_and_a_damaged_record_of_them_is_not_guessed(tmp_path):
    assert load_sequence(tmp_path) == 0
    save_sequence(tmp_path, 1764000000000000)
    assert load_sequence(tmp_path) == 1764000000000000
    (tmp_path / SEQUENCE_NAME).write_bytes(b"")
    with pytest.raises(RunError, match="no number"):
        load_sequence(tmp_path)
