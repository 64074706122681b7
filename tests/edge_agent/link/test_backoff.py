"""A fleet that was cut off comes back spread over time."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.link.backoff import full_jitter


@given(st.integers(0, 10_000), st.integers())
def test_delay_is_within_its_cap(attempt: int, seed: int) -> None:
    delay_s = full_jitter(attempt, base_s=1, cap_s=60, generator=Random(seed))
    assert 0 <= delay_s <= min(60, 2.0 ** min(attempt, 6))


def test_two_hundred_devices_spread_over_the_whole_window() -> None:
    delays = sorted(full_jitter(6, base_s=1, cap_s=60, generator=Random(device)) for device in range(200))
    per_second = [sum(second <= delay < second + 6 for delay in delays) for second in range(0, 60, 6)]
    assert max(per_second) < 45  # of 20 expected
    assert min(per_second) > 3
