from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.rollout.plan import (
    AbortConfig,
    AbortCriterion,
    ExponentialRate,
    LatencyRule,
    RateIncreaseCriteria,
    RolloutPlan,
)
from fl_server.rollout.waves import (
    TICK_S,
    Phase,
    Rollout,
    RolloutError,
    Tally,
    approve,
    grow,
    halt,
    judge_failures,
    judge_latency,
    resume,
    roll_back,
)
from models.contract.wave import is_in_wave

FLEET = [f"device-{number}" for number in range(60)]
CANARY = ("device-3", "device-7")


def build(plan: RolloutPlan, key: str = "a key") -> Rollout:
    return Rollout(model="digits", version=2, before=1, previous=None, key=key, plan=plan)


def find_members(rollout: Rollout) -> set[str]:
    wave = rollout.signed_wave
    return {device for device in FLEET if wave is None or is_in_wave(device, wave)}


percentages = st.sets(st.decimals(0, 99, places=2), max_size=4).map(lambda found: (*sorted(found), Decimal(100)))
steps = st.lists(st.sampled_from(["minute", "second", "approve", "halt", "resume", "succeed"]), max_size=60)


@settings(deadline=None)
@given(percentages, st.integers(1, 60), st.text("abc123", min_size=1, max_size=8), steps)
def test_whatever_is_said_a_wave_keeps_who_is_in_it_and_grows_by_its_rate_and_no_further_than_approved(
    waves, rate, key, told
):
    plan = RolloutPlan(waves=waves, devices=CANARY, maximumPerMinute=rate)
    rollout, now_s, began = build(plan, key), 1000.0, set[str]()
    for step in told:
        now_s += {"minute": TICK_S, "second": 1.0}.get(step, 0)
        try:
            match step:
                case "approve":
                    rollout = approve(rollout, rollout.wave + 1)
                case "halt":
                    rollout = halt(rollout, "told so")
                case "resume":
                    rollout = resume(rollout, since=7)
        except RolloutError:
            assert not (step == "halt" and rollout.phase is Phase.ROLLING)
        grown = grow(rollout, devices=FLEET, succeeded=0, now_s=now_s)
        if grown.percentage != rollout.percentage:
            assert rollout.phase is Phase.ROLLING
            assert now_s - rollout.grown_at >= TICK_S
            assert len(find_members(grown) - find_members(rollout) - set(CANARY)) <= rate
        rollout = grown
        assert rollout.percentage <= waves[rollout.wave]
        members = find_members(rollout)
        if rollout.phase is Phase.HALTED:
            assert not members
        else:
            assert members >= began
            assert members >= set(CANARY)
            began = members


@settings(deadline=None)
@given(percentages, st.integers(3, 80))
def test_approved_each_time_it_reaches_everybody_in_as_many_minutes_as_the_rate_asks_for(waves, rate):
    rollout, minutes = build(RolloutPlan(waves=waves, maximumPerMinute=rate)), 0
    while rollout.phase is not Phase.DONE:
        minutes += 1
        rollout = grow(rollout, devices=FLEET, succeeded=0, now_s=minutes * TICK_S)
        if rollout.may_be_approved:
            rollout = approve(rollout, rollout.wave + 1)
        assert minutes <= len(FLEET) / rate + len(waves)
    assert rollout.signed_wave is None


def test_exponential_rate_rises_with_success_up_to_the_maximum():
    exponential = ExponentialRate(
        baseRatePerMinute=50,
        incrementFactor=Decimal("1.5"),
        rateIncreaseCriteria=RateIncreaseCriteria(numberOfSucceededThings=100),
    )
    plan = RolloutPlan(exponentialRate=exponential, maximumPerMinute=120)
    assert [plan.compute_rate(succeeded) for succeeded in (0, 99, 100, 250, 300, 10**6)] == [50, 50, 75, 112, 120, 120]
    assert replace(plan, maximumPerMinute=None).compute_rate(300) == 168


def test_wave_without_a_rate_is_complete_at_once_and_the_listed_devices_come_first():
    rollout = grow(
        build(RolloutPlan(waves=(Decimal(0), Decimal(100)), devices=CANARY)), devices=FLEET, succeeded=0, now_s=1
    )
    assert rollout.may_be_approved
    assert find_members(rollout) == set(CANARY)
    done = grow(approve(rollout, 1), devices=FLEET, succeeded=2, now_s=2)
    assert (done.phase, done.signed_wave) == (Phase.DONE, None)
    assert approve(done, 1) == done, "a command that is repeated after a restart"


def test_minutes_without_a_coordinator_do_not_count():
    rollout = grow(build(RolloutPlan(maximumPerMinute=5)), devices=FLEET, succeeded=0, now_s=1000)
    later = grow(rollout, devices=FLEET, succeeded=0, now_s=1000 + 100 * TICK_S)
    assert len(find_members(later)) == 10
    assert grow(later, devices=FLEET, succeeded=0, now_s=500).percentage > later.percentage, "the clock was set back"


def test_what_cannot_be_said_is_refused_in_words():
    rollout = grow(
        build(RolloutPlan(waves=(Decimal(50), Decimal(100)), maximumPerMinute=1)), devices=FLEET, succeeded=0, now_s=1
    )
    with pytest.raises(RolloutError, match=r"the rollout of digits version 2 has reached 0.* of 50 %"):
        approve(rollout, 1)
    halted = halt(rollout, "on Monday")
    assert halt(halted, "again") == halted
    with pytest.raises(RolloutError, match="is halted: there is no wave to approve"):
        approve(halted, 1)
    ended = roll_back(halted, "it is too slow")
    for said in (lambda: halt(ended, "why"), lambda: resume(ended, since=0), lambda: approve(ended, 1)):
        with pytest.raises(RolloutError, match="rolled back"):
            said()
    assert find_members(ended) == set(), "what has failed is for nobody, should it still be champion"
    resumed = resume(halted, since=9)
    assert (resumed.since, find_members(resumed)) == (9, find_members(rollout))
    assert resume(replace(resumed, since=3), since=9).since == 3


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100), st.integers(1, 20))
def test_abort_rule_is_broken_by_its_share_of_failures_among_enough_devices(updated, failed, threshold, least):
    rule = AbortCriterion(thresholdPercentage=Decimal(threshold), minNumberOfExecutedThings=least)
    plan = RolloutPlan(abortConfig=AbortConfig(criteriaList=(rule,)))
    reason = judge_failures(plan, Tally(updated=updated, failed=failed))
    is_broken = failed > 0 and updated + failed >= least and failed / (updated + failed) >= threshold / 100
    assert (reason is not None) == is_broken
    assert reason is None or f"{failed} of {updated + failed} devices failed" in reason


def test_latency_rule_compares_medians_of_enough_devices():
    rule = LatencyRule(max_ratio=Decimal(2), min_devices=3)
    assert judge_latency(rule, [5, 5, 90], [2, 2, 2]) == (
        "devices on it take 5 ms, those on the version before 2 ms; 2 times as much ends it"
    )
    assert judge_latency(rule, [4, 4, 90], [2, 2, 2]) is None
    assert judge_latency(rule, [90, 90], [2, 2, 2]) is None
    assert judge_latency(rule, [90, 90, 90], [2, 2]) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"waves": (Decimal(10), Decimal(5), Decimal(100))}, "must rise and end with 100"),
        ({"waves": (Decimal(10),)}, "must rise and end with 100"),
        ({"waves": ()}, "waves are none"),
        ({"waves": (Decimal(-1), Decimal(100))}, "-1 %"),
        ({"devices": ("a/b",)}, "a/b"),
        ({"devices": ("a",) * 501}, "at most 500"),
        ({"maximumPerMinute": 0}, "maximumPerMinute is 0"),
        ({"max_quality_drop": Decimal(-1)}, "max_quality_drop"),
    ],
)
def test_plan_that_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        RolloutPlan(**fields)
