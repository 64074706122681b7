"""Which version answers whom, and that nobody notices a change."""

import gc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import RequestError
from edge_agent.inference.engine import Engine, Rivalry
from edge_agent.inference.model import ServedModel, load_model
from edge_agent.inference.shadow import WAITING_MAX, Shadow, compare_outputs
from models.tensors.spec import TensorSpec
from tests.simulators.tiny_models import FEATURES, INPUT, save_version
from tests.simulators.waiting import wait_until

ROW = np.ones((1, FEATURES), np.float32)


def load(tmp_path: Path, version: int) -> ServedModel:
    directory = tmp_path / str(version)
    return load_model(directory, save_version(directory, version=version))


def build_pair(tmp_path: Path, *, weight: float = 0.0, shadow: bool = False) -> Engine:
    engine = Engine("tiny")
    engine.challenge(Rivalry(model=load(tmp_path, 2), weight=weight, shadow=shadow))
    engine.activate(load(tmp_path, 1))
    return engine


def test_old_model_is_released_after_the_last_request_that_holds_it(tmp_path: Path) -> None:
    engine = Engine("tiny")
    assert engine.active is None
    engine.activate(load(tmp_path, 1))
    in_flight = engine.active
    assert in_flight is not None
    old = weakref.ref(in_flight)
    engine.activate(load(tmp_path, 2))
    assert in_flight.infer({"features": ROW})["logits"][0, 0] == 4
    assert engine.active is not None
    assert engine.active.infer({"features": ROW})["logits"][0, 0] == 8
    del in_flight
    gc.collect()
    assert old() is None


def test_what_is_not_served_is_404_and_what_is_not_yet_503(tmp_path: Path) -> None:
    engine = Engine("tiny")
    assert not engine.is_ready()
    with pytest.raises(RequestError, match="first release") as early:
        engine.select("tiny", None)
    assert early.value.status == 503
    engine.activate(load(tmp_path, 1))
    assert engine.is_ready("tiny", "1")
    assert not engine.is_ready("tiny", "2")
    assert not engine.is_ready("other")
    for name, version, said in (("other", None, "'tiny' is"), ("tiny", "2", "1 is"), ("tiny", "01", "1 is")):
        with pytest.raises(RequestError, match=said) as missing:
            engine.select(name, version)
        assert missing.value.status == 404


def test_split_gives_the_weight_sticks_to_a_key_and_answers_whoever_names_a_version(tmp_path: Path) -> None:
    engine = build_pair(tmp_path, weight=0.3)
    keys = [f"key-{number}" for number in range(4000)]
    chosen = [engine.select("tiny", None, key=key).version for key in keys]
    assert chosen == [engine.select("tiny", None, key=key).version for key in keys]
    assert Counter(chosen)["2"] / len(keys) == pytest.approx(0.3, abs=0.03)
    assert engine.select("tiny", None).version == "1"
    assert engine.select("tiny", "2").version == "2"
    assert [model.version for model in engine.list_models()] == ["1", "2"]


@pytest.mark.parametrize(("weight", "version"), [(0.0, "1"), (1.0, "2")])
def test_whole_weights_leave_nothing_to_chance(tmp_path: Path, weight: float, version: str) -> None:
    engine = build_pair(tmp_path, weight=weight)
    assert {engine.select("tiny", None, key=str(number)).version for number in range(500)} == {version}


def test_challenger_of_other_tensors_or_the_same_version_is_left_out(tmp_path: Path) -> None:
    rival = load(tmp_path, 2)
    engine = Engine("tiny")
    engine.challenge(Rivalry(model=rival, weight=1.0))
    engine.activate(load(tmp_path / "other", 2))
    assert len(engine.list_models()) == 1
    champion = load(tmp_path, 1)
    champion.manifest = replace(champion.manifest, inputs=(TensorSpec("x", INPUT.shape, INPUT.dtype),))
    engine.activate(champion)
    assert engine.select("tiny", None, key="k") is champion


def test_challenger_goes_under_load_and_whoever_holds_it_is_still_answered(tmp_path: Path) -> None:
    engine = build_pair(tmp_path, weight=1.0)
    held = engine.select("tiny", None, key="k")
    assert held.version == "2"
    engine.challenge(None)
    assert held.infer({"features": ROW})["logits"][0, 0] == 8
    assert engine.select("tiny", None, key="k").version == "1"
    assert [model.version for model in engine.list_models()] == ["1"]
    engine.activate(load(tmp_path, 3))
    assert [model.version for model in engine.list_models()] == ["3"]


def test_shadow_compares_later_what_the_champion_answered(tmp_path: Path) -> None:
    engine = build_pair(tmp_path, shadow=True)
    champion = engine.select("tiny", None, key="k")
    assert champion.version == "1"
    for _ in range(5):
        engine.mirror(champion, {"features": ROW}, champion.infer({"features": ROW}))
    engine.mirror(engine.list_models()[1], {"features": ROW}, {})  # not the champion's: nothing to compare
    wait_until(lambda: engine.snapshot_shadow().rows == 5, "the comparisons")
    assert engine.snapshot_shadow().agreeing == 5
    assert engine.snapshot_shadow().largest_difference == 4.0
    assert engine.list_models()[1].statistics.snapshot().executions == 5


def test_shadow_counts_failures_and_drops_what_waits_too_long(tmp_path: Path) -> None:
    shadow = Shadow(load(tmp_path, 2))
    shadow.offer({"nonsense": ROW}, {})
    wait_until(lambda: shadow.snapshot().failures == 1, "the failure")
    long = {"features": np.ones((200_000, FEATURES), np.float32)}
    outputs = {"logits": np.ones((200_000, 3), np.float32)}
    for _ in range(WAITING_MAX):
        shadow.offer(long, outputs)
    assert shadow.snapshot().dropped > 0
    shadow.close()


def test_rows_agree_by_their_largest_value() -> None:
    ours = {"a": np.array([[1, 2], [3, 1], [0, 1]], np.float32), "b": np.array([[10.0], [10.0], [10.0]])}
    theirs = {"a": np.array([[1, 3], [1, 3], [0, 1]], np.float32), "b": np.array([[10.05], [10.0], [11.0]])}
    assert compare_outputs(ours, theirs) == (3, 1, 2.0)


def test_strings_agree_if_they_are_the_same() -> None:
    ours, theirs = ({"label": np.array([["a"], [last]], object)} for last in ("b", "c"))
    assert compare_outputs(ours, theirs) == (2, 1, 0.0)


def test_comparison_survives_what_is_not_finite() -> None:
    nan, infinity = np.array([[np.nan, 1]]), np.array([[np.inf, 1]])
    assert compare_outputs({"a": nan}, {"a": nan}) == (1, 1, 0.0)
    assert compare_outputs({"a": infinity}, {"a": infinity}) == (1, 1, 0.0)


def test_loading_is_off_unless_configured(tmp_path: Path) -> None:
    engine = Engine("tiny")
    for action in (engine.load, engine.unload):
        with pytest.raises(RequestError, match="repository = true") as refused:
            action("tiny")
        assert refused.value.status == 403


def test_unloaded_model_waits_until_it_is_loaded_again(tmp_path: Path) -> None:
    engine = Engine("tiny", load_again=lambda: engine.activate(load(tmp_path, 1)))
    engine.load("tiny")
    assert engine.is_ready()
    engine.unload("tiny")
    assert not engine.is_ready()
    with pytest.raises(RequestError, match="'tiny' is"):
        engine.load("other")


def test_statistics_count_requests_rows_failures_and_runs(tmp_path: Path) -> None:
    model = load(tmp_path, 1)
    assert model.statistics.snapshot().executions == 0  # its warm-up is nobody's request
    model.infer({"features": ROW})
    model.run({"features": ROW})
    model.statistics.record(3, 0.5)
    model.statistics.record_failure(0.25)
    found = model.statistics.snapshot()
    assert (found.requests, found.rows, found.requests_ns) == (1, 3, 500_000_000)
    assert (found.failures, found.failures_ns, found.executions) == (1, 250_000_000, 1)
    assert found.executions_ns > 0
    assert found.last_ms > 0


def test_batch_of_a_small_model_pays(tmp_path: Path) -> None:
    assert load(tmp_path, 1).batching_pays  # one call costs more than sixteen rows of it
