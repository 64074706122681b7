"""Waiting for something to become true, with a deadline."""

import time
from collections.abc import Callable

_PAUSE_S = 0.02


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float = 20.0) -> None:
    """Return once `condition` holds; fail when it still does not after `timeout_s`."""
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, f"after {timeout_s:.0f} s still waiting for {what}"
        time.sleep(_PAUSE_S)
