"""The update state machine, directly and by property."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.updates.machine import (
    Action,
    Activated,
    Event,
    Failed,
    Fetched,
    Healthy,
    Offered,
    Phase,
    UpdateState,
    advance,
)

ONE, TWO, THREE = "digits-1", "digits-2", "digits-3"
SERVING_ONE = UpdateState(active=ONE)


def run(*events: Event, state: UpdateState = SERVING_ONE) -> tuple[UpdateState, list[Action]]:
    actions = []
    for event in events:
        state, action = advance(state, event)
        actions.append(action)
    return state, actions


def test_healthy_version_becomes_the_active_one() -> None:
    state, actions = run(Offered(TWO), Fetched(TWO), Activated(TWO), Healthy(TWO))
    assert actions == [Action.FETCH, Action.ACTIVATE, Action.TRY, Action.COMMIT]
    assert state == UpdateState(active=TWO)


def test_version_that_failed_probation_is_never_fetched_again() -> None:
    state, actions = run(Offered(TWO), Fetched(TWO), Activated(TWO), Failed(TWO), Offered(TWO))
    assert actions[-2:] == [Action.ROLL_BACK, Action.NOTHING]
    assert TWO in state.rejected
    assert state.active == ONE


def test_offer_of_the_active_version_does_nothing() -> None:
    assert run(Offered(ONE)) == (SERVING_ONE, [Action.NOTHING])


def test_offer_that_comes_twice_is_fetched_once() -> None:
    assert run(Offered(TWO), Offered(TWO))[1] == [Action.FETCH, Action.NOTHING]


def test_newer_offer_supersedes_a_fetch() -> None:
    state, actions = run(Offered(TWO), Offered(THREE), Fetched(TWO))
    assert actions == [Action.FETCH, Action.FETCH, Action.NOTHING]
    assert (state.phase, state.target) == (Phase.FETCHING, THREE)


def test_fetch_of_a_withdrawn_version_is_abandoned() -> None:
    assert run(Offered(TWO), Offered(ONE)) == (SERVING_ONE, [Action.FETCH, Action.ABANDON])


def test_newer_offer_waits_for_a_trial() -> None:
    state, actions = run(Offered(TWO), Fetched(TWO), Offered(THREE), Activated(TWO), Offered(THREE), Healthy(TWO))
    assert actions == [Action.FETCH, Action.ACTIVATE, Action.DEFER, Action.TRY, Action.DEFER, Action.COMMIT]
    assert state.active == TWO


def test_fetch_that_failed_may_be_offered_again() -> None:
    assert run(Offered(TWO), Failed(TWO), Offered(TWO))[1] == [Action.FETCH, Action.NOTHING, Action.FETCH]


_DIGESTS = st.sampled_from([ONE, TWO, THREE])
_EVENTS = st.lists(st.builds(lambda kind, digest: kind(digest), st.sampled_from(Event.__args__), _DIGESTS))


@given(_EVENTS)
def test_no_history_serves_a_rejected_version_or_skips_a_step(events: list[Event]) -> None:
    state = SERVING_ONE
    for event in events:
        before, (state, action) = state, advance(state, event)
        assert state.active not in state.rejected
        assert before.rejected <= state.rejected
        assert state.target not in state.rejected
        assert (state.active != before.active) == (action is Action.COMMIT)
        if action is Action.COMMIT:
            assert before.phase is Phase.PROBATION
            assert state.active == before.target
        if action is Action.FETCH:
            assert isinstance(event, Offered)
            assert event.digest not in before.rejected | {before.active}
        if action is Action.ROLL_BACK:
            assert state.active == before.active
