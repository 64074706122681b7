"""A hostile version ends in a child: the caller gets one line and lives."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import StalledError, TransientError
from edge_agent.inference.sandbox import Pace, try_in_sandbox
from models.contract.golden import Golden
from tests.simulators.hostile_models import build_endless, build_external, build_foreign, build_greedy, build_slow
from tests.simulators.tiny_models import FEATURES, INPUT, OUTPUT, build_graph, save_version


@pytest.mark.parametrize(
    "build",
    [
        build_greedy,
        build_foreign,
        lambda: build_external("/etc/hostname"),
        lambda: build_external("../secret.bin"),
        lambda: build_graph(1).SerializeToString()[:-20],
        lambda: b"no graph",
    ],
    ids=["64 GB", "custom operator", "absolute path", "path above", "truncated", "junk"],
)
def test_hostile_graph_is_refused_in_one_line(tmp_path: Path, build: Callable[[], bytes]) -> None:
    save_version(tmp_path / "v", graph=build())
    with pytest.raises(StalledError) as refused:
        try_in_sandbox(tmp_path / "v")
    assert str(refused.value)
    assert "\n" not in str(refused.value)


def test_hard_linked_external_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(np.ones((FEATURES, 3), np.float32).tobytes())
    save_version(tmp_path / "v", graph=build_external("weights.data"))
    os.link(tmp_path / "secret.bin", tmp_path / "v" / "weights.data")
    with pytest.raises(StalledError):
        try_in_sandbox(tmp_path / "v")


def test_graph_without_end_is_ended(tmp_path: Path) -> None:
    save_version(tmp_path / "v", graph=build_endless())
    with pytest.raises(StalledError, match="within 4 s"):
        try_in_sandbox(tmp_path / "v", deadline_s=4.0)


def test_device_that_is_too_busy_to_try_a_version_says_nothing_of_it(tmp_path: Path) -> None:
    save_version(tmp_path / "v")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "v" / "inference.onnx").unlink()
    (tmp_path / "v" / "inference.onnx").symlink_to(tmp_path / "pipe")  # whoever opens it waits, and takes no time
    with pytest.raises(TransientError, match="too busy"):
        try_in_sandbox(tmp_path / "v", deadline_s=8.0)


def test_good_version_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_version(tmp_path / "v")
    before = sorted(path.name for path in (tmp_path / "v").iterdir())
    try_in_sandbox(tmp_path / "v")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == before


def test_version_that_answers_otherwise_than_where_it_was_packaged_fails_its_trial(tmp_path: Path) -> None:
    rows = np.eye(FEATURES, dtype=np.float32)
    golden = Golden(
        inputs={INPUT.name: rows}, outputs={OUTPUT.name: np.array([[1, 2, 3]] * 4, np.float32)}, tolerance=0.1
    )
    weight = np.array([[1, 2, 3]] * FEATURES, np.float32)
    save_version(tmp_path / "v", graph=build_external("weights.bin"), weights=(1.01 * weight).tobytes(), golden=golden)
    try_in_sandbox(tmp_path / "v")
    weight[2] = weight[2, ::-1]
    save_version(tmp_path / "bad", graph=build_external("weights.bin"), weights=weight.tobytes(), golden=golden)
    with pytest.raises(StalledError, match="on this device it is not the version that was packaged"):
        try_in_sandbox(tmp_path / "bad")
    (tmp_path / "v" / "golden.bin").write_bytes(b"junk")
    with pytest.raises(StalledError, match="its digest is another"):
        try_in_sandbox(tmp_path / "v")


def test_version_that_is_slower_than_the_champion_by_more_than_is_allowed_fails_its_trial(tmp_path: Path) -> None:
    for name, trips in (("champion", 2000), ("alike", 2200), ("slow", 10_000)):
        save_version(tmp_path / name, graph=build_slow(trips))
    pace = Pace(beside=tmp_path / "champion", max_ratio=2.5)
    try_in_sandbox(tmp_path / "alike", pace=pace)
    with pytest.raises(StalledError, match=r"times the champion's, at most 2\.5 is allowed"):
        try_in_sandbox(tmp_path / "slow", pace=pace)


def test_version_with_its_weights_outside_is_tried_as_it_will_be_served(tmp_path: Path) -> None:
    weights = np.ones((FEATURES, 3), np.float32)
    save_version(tmp_path / "v", graph=build_external("weights.bin"), weights=weights.tobytes())
    try_in_sandbox(tmp_path / "v")
    weights[0, 0] = np.nan
    save_version(tmp_path / "bad", graph=build_external("weights.bin"), weights=weights.tobytes())
    with pytest.raises(StalledError, match="not finite"):
        try_in_sandbox(tmp_path / "bad")
