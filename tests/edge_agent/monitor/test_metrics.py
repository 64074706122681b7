"""What a scraper reads of a device."""

from edge_agent.inference.shadow import ShadowSnapshot
from edge_agent.inference.statistics import ModelStatistics
from edge_agent.monitor.latency import LatencyHistogram
from edge_agent.monitor.metrics import build_metrics


def test_metrics_are_cumulative_buckets() -> None:
    histogram = LatencyHistogram()
    for seconds in (1e-5, 1e-3, 1.0):
        histogram.record(seconds)
    text = build_metrics(latencies=histogram.snapshot(), sum_s=histogram.sum_s, failures=4, rss_mb=80, model="m")
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("edge_agent_inference_seconds_b")]
    counts = [int(count) for _, count in lines]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert "edge_agent_inference_failures_total 4" in text
    assert "_version" not in text


def test_each_version_has_counts_of_its_own_and_a_challenger_its_comparison() -> None:
    champion, challenger = ModelStatistics(), ModelStatistics()
    champion.record(3, 0.25)
    challenger.record_failure(0.1)
    text = build_metrics(
        latencies=LatencyHistogram().snapshot(),
        sum_s=0,
        failures=0,
        rss_mb=80,
        model="m",
        versions=[(4, champion.snapshot()), (5, challenger.snapshot())],
        comparison=ShadowSnapshot(rows=7, agreeing=6, largest_difference=0.5),
    )
    for line in (
        'edge_agent_active_version{model="m"} 4',
        'edge_agent_challenger_version{model="m"} 5',
        'edge_agent_model_requests_total{model="m",version="4"} 1',
        'edge_agent_model_request_seconds_total{model="m",version="4"} 0.25',
        'edge_agent_model_rows_total{model="m",version="4"} 3',
        'edge_agent_model_failures_total{model="m",version="5"} 1',
        'edge_agent_shadow_agreeing_rows_total{model="m"} 6',
        'edge_agent_shadow_largest_difference{model="m"} 0.5',
    ):
        assert line in text.splitlines()
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
