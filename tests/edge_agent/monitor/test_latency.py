"""The latency histogram stays small and tells quantiles truly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.monitor.latency import LatencyHistogram, compute_quantile, subtract
from edge_agent.monitor.telemetry import build_telemetry, read_rss_mb


@given(st.lists(st.floats(2e-6, 50), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_quantile_is_within_a_tenth(latencies: list[float], quantile: float) -> None:
    histogram = LatencyHistogram()
    for seconds in latencies:
        histogram.record(seconds)
    true = np.quantile(latencies, quantile, method="inverted_cdf")
    assert compute_quantile(histogram.snapshot(), quantile) == pytest.approx(true, rel=0.1)


def test_telemetry_counts_only_what_is_new() -> None:
    histogram = LatencyHistogram()
    histogram.record(10.0)
    first = histogram.snapshot()
    histogram.record(0.001)
    counts = subtract(histogram.snapshot(), first)
    telemetry = build_telemetry(model="m", version=2, now_s=1, uptime_s=2, rss_mb=3, latencies=counts, dropped=7)
    assert telemetry.dropped == 7
    assert telemetry.latency_p99_ms == pytest.approx(1.0, rel=0.1)


def test_without_answers_there_is_no_latency() -> None:
    counts = LatencyHistogram().snapshot()
    telemetry = build_telemetry(model="m", version=None, now_s=1, uptime_s=2, rss_mb=3, latencies=counts, dropped=7)
    assert telemetry.dropped == 7
    assert telemetry.latency_p50_ms is None


@pytest.mark.parametrize("seconds", [0.0, -1e-9, 1e-12, 1e9])
def test_no_latency_is_beyond_the_histogram(seconds: float) -> None:
    histogram = LatencyHistogram()
    histogram.record(seconds)
    assert sum(histogram.snapshot()) == 1


def test_resident_memory_is_that_of_this_process() -> None:
    assert 10 < read_rss_mb() < 10_000
