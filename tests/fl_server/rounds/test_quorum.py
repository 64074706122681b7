import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_server.rounds.quorum import Decision, choose_poll_interval_s, decide_round, may_begin

COUNT = st.integers(0, 100)
SECONDS = st.floats(0, 1000)


@given(COUNT, st.integers(1, 100), COUNT, SECONDS)
def test_round_waits_for_every_device_until_its_deadline(accepted, waiting, quorum, elapsed_s):
    decision = decide_round(
        accepted=accepted, waiting=waiting, quorum=quorum, elapsed_s=elapsed_s, deadline_s=elapsed_s + 1
    )
    assert decision is Decision.WAIT


@given(COUNT, COUNT, st.integers(1, 100), SECONDS)
def test_round_is_complete_at_its_deadline_with_a_quorum_and_abandoned_without(accepted, waiting, quorum, deadline_s):
    decision = decide_round(
        accepted=accepted, waiting=waiting, quorum=quorum, elapsed_s=deadline_s, deadline_s=deadline_s
    )
    assert decision is (Decision.COMPLETE if accepted >= quorum else Decision.ABANDON)


def test_round_is_over_as_soon_as_nobody_is_left_to_reply():
    assert decide_round(accepted=3, waiting=0, quorum=2, elapsed_s=0, deadline_s=60) is Decision.COMPLETE
    assert decide_round(accepted=1, waiting=0, quorum=2, elapsed_s=0, deadline_s=60) is Decision.ABANDON


@pytest.mark.parametrize(
    ("ready", "elapsed_s", "expected"),
    [
        (5, 0, Decision.COMPLETE),
        (4, 9, Decision.WAIT),
        (4, 10, Decision.COMPLETE),
        (3, 10, Decision.COMPLETE),
        (2, 10, Decision.ABANDON),
    ],
)
def test_run_begins_with_all_devices_or_with_a_quorum_at_the_timeout(ready, elapsed_s, expected):
    assert may_begin(ready=ready, wanted=5, quorum=3, elapsed_s=elapsed_s, timeout_s=10) is expected


@given(st.integers(1, 20_000), st.floats(1, 1000))
def test_devices_together_stay_below_the_poll_budget(devices, budget_per_s):
    interval_s = choose_poll_interval_s(devices=devices, budget_per_s=budget_per_s)
    assert interval_s == 600 or devices / interval_s <= budget_per_s
