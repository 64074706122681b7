"""A staged version in the shadow, in a process of its own: what it does there costs no answer, and decides about it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from edge_agent.inference.engine import Engine
from edge_agent.inference.model import load_version
from edge_agent.inference.rehearsal import Rehearsal, judge
from edge_agent.inference.shadow import ShadowSnapshot
from models.contract.terms import ProbationRules
from tests.simulators.hostile_models import build_external, build_moody, build_slow
from tests.simulators.tiny_models import CLASSES, FEATURES, INPUT, build_graph, save_version
from tests.simulators.waiting import wait_until

ROW = np.ones((1, FEATURES), np.float32)
RULES = ProbationRules(seconds=60, min_agreement=Decimal("0.9"))


def weigh(*columns: int) -> bytes:
    """Return weights by which each class is one feature."""
    return np.eye(FEATURES, dtype=np.float32)[:, list(columns)].tobytes()


class Stage:
    """A champion that answers, and a version that answers in its shadow."""

    def __init__(self, directory: Path, rules: ProbationRules, *, deadline_s: float = 20.0) -> None:
        self.engine, self.failed = Engine("tiny"), threading.Event()
        self.engine.activate(load_version(directory / "champion"))
        self.rehearsal = Rehearsal(
            self.engine,
            directory / "staged",
            champion_dir=directory / "champion",
            rules=rules,
            on_failed=self.failed.set,
            deadline_s=deadline_s,
        )

    def answer(self, rows: np.ndarray) -> np.ndarray:
        champion = self.engine.select("tiny", None)
        outputs = champion.run({INPUT.name: rows})
        self.engine.mirror(champion, {INPUT.name: rows}, outputs)
        return outputs["logits"]

    def wait_for(self, rows: int) -> None:
        wait_until(lambda: self.rehearsal._shadow.snapshot().rows == rows, f"{rows} compared rows")

    @property
    def pid(self) -> int:
        return self.rehearsal._understudy._partner._child.pid


@contextmanager
def staged(directory: Path, rules: ProbationRules = RULES, **options: float) -> Iterator[Stage]:
    stage = Stage(directory, rules, **options)
    with closing(stage.rehearsal):
        yield stage
    with pytest.raises(ProcessLookupError):
        os.kill(stage.pid, 0)


def save_pair(tmp_path: Path, champion: bytes, version: bytes, *weights: bytes) -> None:
    for name, graph, own in zip(("champion", "staged"), (champion, version), weights or (b"", b""), strict=True):
        save_version(tmp_path / name, graph=graph, weights=own)


def test_version_that_agrees_passes_and_one_that_is_wrong_on_a_slice_does_not(tmp_path: Path) -> None:
    graph = build_external("weights.bin")
    rows = np.eye(FEATURES, dtype=np.float32)[:CLASSES]
    for columns, passes in ((0, 1, 2), True), ((0, 1, 3), False):
        save_pair(tmp_path, graph, graph, weigh(0, 1, 2), weigh(*columns))
        with staged(tmp_path) as stage:
            for _ in range(20):
                stage.answer(rows)
            stage.wait_for(60)
            reason = stage.rehearsal.judge()
        assert not stage.failed.is_set()
        assert reason is None if passes else "agrees in 0.6667 of 60 rows, at least 0.9" in str(reason)


def test_version_without_requests_has_nothing_to_show_and_passes(tmp_path: Path) -> None:
    save_pair(tmp_path, build_slow(1), build_slow(1))
    with staged(tmp_path) as stage:
        assert stage.rehearsal.judge() is None


def test_version_that_crashes_at_the_100th_request_costs_no_answer(tmp_path: Path) -> None:
    save_pair(tmp_path, build_slow(1), build_slow(1))
    with staged(tmp_path) as stage:
        for number in range(1, 101):
            if number == 100:
                stage.wait_for(99)
                os.kill(stage.pid, signal.SIGSEGV)
            assert stage.answer(ROW)[0, 0] == FEATURES
            wait_until(stage.rehearsal._shadow._waiting.empty, "the comparison")
        assert stage.failed.wait(20)
        assert "ended by SIGSEGV" in str(stage.rehearsal.judge())
        assert stage.answer(ROW)[0, 0] == FEATURES


@pytest.mark.parametrize(
    ("feature", "said"),
    [(-1.0, "the model cannot run on these inputs"), (1e15, "not done within")],
    ids=["fails", "hangs"],
)
def test_version_that_fails_or_hangs_at_one_request_does_not_pass(tmp_path: Path, feature: float, said: str) -> None:
    save_pair(tmp_path, build_slow(1), build_moody())
    with staged(tmp_path, deadline_s=1.0) as stage:
        stage.answer(ROW)
        stage.wait_for(1)
        stage.answer(feature * ROW)
        stage.answer(ROW)
        assert stage.failed.wait(20)
        assert said in str(stage.rehearsal.judge())


def test_version_that_is_slower_in_the_shadow_than_is_allowed_does_not_pass(tmp_path: Path) -> None:
    rules = ProbationRules(seconds=60, max_latency_ratio=Decimal("2.5"))
    for trips, passes in (2200, True), (10_000, False):
        save_pair(tmp_path, build_slow(2000), build_slow(trips))
        with staged(tmp_path, rules) as stage:
            for _ in range(20):
                stage.answer(ROW)
            stage.wait_for(20)
            reason = stage.rehearsal.judge()
        assert reason is None if passes else "times the champion's, at most 2.5" in str(reason)


def test_version_with_other_tensors_is_not_compared(tmp_path: Path) -> None:
    save_pair(tmp_path, build_slow(1), build_graph(1, output="scores").SerializeToString())
    manifest = (tmp_path / "staged" / "manifest.json").read_bytes()
    (tmp_path / "staged" / "manifest.json").write_bytes(manifest.replace(b'"logits"', b'"scores"'))
    with staged(tmp_path) as stage:
        stage.answer(ROW)
        assert stage.rehearsal.judge() is None
        assert stage.rehearsal._shadow.snapshot() == ShadowSnapshot()


@pytest.mark.parametrize(
    ("found", "ratio", "passes"),
    [
        (ShadowSnapshot(), None, True),
        (ShadowSnapshot(rows=10, agreeing=9), None, True),
        (ShadowSnapshot(rows=10, agreeing=8), None, False),
        (ShadowSnapshot(rows=10, agreeing=10, failures=1), None, False),
        (ShadowSnapshot(rows=10, agreeing=10, dropped=9), 2.0, True),
        (ShadowSnapshot(rows=10, agreeing=10), 2.1, False),
    ],
)
def test_rules_decide(found: ShadowSnapshot, ratio: float | None, passes: bool) -> None:  # noqa: FBT001
    rules = ProbationRules(seconds=1, min_agreement=Decimal("0.9"), max_latency_ratio=Decimal(2))
    assert (judge(rules, found, ratio) is None) is passes
