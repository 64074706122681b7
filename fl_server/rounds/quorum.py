"""When a run may begin, when a round is over, and how often devices may ask. Pure."""

from enum import Enum, auto

POLL_INTERVAL_MIN_S, POLL_INTERVAL_MAX_S = 0.2, 600.0


class Decision(Enum):
    """What to do with a round now."""

    WAIT = auto()
    COMPLETE = auto()
    ABANDON = auto()


def decide_round(*, accepted: int, waiting: int, quorum: int, elapsed_s: float, deadline_s: float) -> Decision:
    """Return what to do with a round.

    Every reply before the deadline counts, never the first so many: a quorum may only abandon.

    Args:
        accepted: Updates that count so far.
        waiting: Devices that were asked, have not replied, and are not known to be gone.
        quorum: Least updates that make a round.
        elapsed_s: Since the round began.
        deadline_s: When it ends at the latest.
    """
    if waiting and elapsed_s < deadline_s:
        return Decision.WAIT
    return Decision.COMPLETE if accepted >= quorum else Decision.ABANDON


def may_begin(*, ready: int, wanted: int, quorum: int, elapsed_s: float, timeout_s: float) -> Decision:
    """Return whether to begin with the `ready` of `wanted` devices: all of them, or a quorum at the timeout."""
    if ready < wanted and elapsed_s < timeout_s:
        return Decision.WAIT
    return Decision.COMPLETE if ready >= quorum else Decision.ABANDON


def choose_poll_interval_s(*, devices: int, budget_per_s: float) -> float:
    """Return how often each of `devices` may ask the SuperLink, s, so that together they keep the budget.

    A quarter of the budget is left to heartbeats, arrays and the coordinator itself.
    """
    return min(max(devices / (0.75 * budget_per_s), POLL_INTERVAL_MIN_S), POLL_INTERVAL_MAX_S)
