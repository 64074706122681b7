"""A machine trains where its owner can spare it, and says why not without telling of its samples."""

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import TrainingSettings
from edge_agent.training.admission import Conditions, find_refusal, is_within

IDLE = Conditions(on_mains=True, battery=None, temperature_c=None, load=None, metered=False, minute=720)


def test_machine_of_which_nothing_bad_is_known_may_train() -> None:
    assert find_refusal(TrainingSettings(), IDLE) is None
    bounds = {"max_load": 0.5, "max_temperature_c": 60.0, "min_battery": 1.0, "needs_mains": True, "min_new_samples": 9}
    assert find_refusal(TrainingSettings(**bounds), IDLE) is None


@pytest.mark.parametrize(
    ("allowed", "good", "bad", "key"),
    [
        ({"needs_mains": True}, {}, {"on_mains": False, "battery": 1.0}, "needs_mains"),
        ({}, {"on_mains": False, "battery": 0.3}, {"on_mains": False, "battery": 0.29}, "min_battery"),
        ({}, {"on_mains": True, "battery": 0.01}, {"on_mains": False, "battery": 0.01}, "min_battery"),
        ({"max_temperature_c": 60.0}, {"temperature_c": 60.0}, {"temperature_c": 60.1}, "max_temperature_c"),
        ({}, {"metered": False}, {"metered": True}, "allow_metered"),
        ({"hours": "22:00-06:00"}, {"minute": 1320}, {"minute": 1319}, "hours"),
    ],
)
def test_each_bound_of_the_owner_refuses_by_its_key(allowed: dict, good: dict, bad: dict, key: str) -> None:
    settings = TrainingSettings(**allowed)
    assert find_refusal(settings, replace(IDLE, **good)) is None
    reason = find_refusal(settings, replace(IDLE, **bad))
    assert reason is not None
    assert f"training.{key}" in reason


def test_load_refuses_in_the_words_of_samples() -> None:
    settings = TrainingSettings(max_load=0.5, min_new_samples=1)
    assert find_refusal(settings, replace(IDLE, load=0.5, new_samples=1)) is None
    few = find_refusal(settings, replace(IDLE, load=0.5, new_samples=0))
    assert find_refusal(settings, replace(IDLE, load=0.51, new_samples=1)) == few is not None


def test_metered_network_is_the_owners_to_allow() -> None:
    assert find_refusal(TrainingSettings(allow_metered=True), replace(IDLE, metered=True)) is None


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_reason_that_comes_from_samples_tells_nothing_of_them(needed: int, found: int) -> None:
    reason = find_refusal(TrainingSettings(min_new_samples=needed), replace(IDLE, new_samples=found))
    assert reason == (None if found >= needed else "not admitted here now")


@given(st.integers(0, 1439), st.integers(0, 1439))
def test_hours_and_those_between_them_are_the_whole_day(first: int, end: int) -> None:
    inside = [minute for minute in range(1440) if is_within((first, end), minute)]
    expected = range(first, end) if first < end else chain(range(end), range(first, 1440))
    assert inside == list(expected)


@pytest.mark.parametrize(
    "wrong",
    [{"hours": "22-6"}, {"hours": "24:00-06:00"}, {"min_battery": 30.0}, {"niceness": -1}, {"max_memory_mb": 10}],
)
def test_bound_that_makes_no_sense_is_refused_by_its_key(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"training.{next(iter(wrong))}"):
        TrainingSettings(**wrong)
