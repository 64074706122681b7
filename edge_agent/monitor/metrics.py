"""What a scraper reads: the Prometheus text format 0.0.4. Nothing of it leaves the device by itself."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from edge_agent.monitor.latency import BUCKETS_PER_OCTAVE, bucket_end_s


class Counts(Protocol):
    """What one version has done since it was loaded."""

    @property
    def requests(self) -> int: ...
    @property
    def requests_ns(self) -> int: ...
    @property
    def failures(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def executions(self) -> int: ...
    @property
    def executions_ns(self) -> int: ...


class Comparison(Protocol):
    """What comparing the challenger with the champion found."""

    @property
    def rows(self) -> int: ...
    @property
    def agreeing(self) -> int: ...
    @property
    def largest_difference(self) -> float: ...
    @property
    def failures(self) -> int: ...
    @property
    def dropped(self) -> int: ...


def build_metrics(
    *,
    latencies: Sequence[int],
    sum_s: float,
    failures: int,
    rss_mb: float,
    model: str,
    versions: Sequence[tuple[int, Counts]] = (),
    comparison: Comparison | None = None,
) -> str:
    """Return the device's state.

    Args:
        latencies: A snapshot of the histogram of all answers.
        sum_s: What they took together.
        failures: Inference requests refused, whatever they named.
        rss_mb: Resident memory.
        model: What is served.
        versions: Number and counts of each loaded version, the champion first.
        comparison: None without a challenger in the shadow.
    """
    lines = [
        *_build_histogram(latencies, sum_s),
        *_build("inference_failures_total", "Inference requests that were refused.", {"": failures}),
        *_build("resident_memory_bytes", "Resident memory of the agent.", {"": round(rss_mb * 1e6)}),
        *_build_versions(model, versions),
    ]
    if comparison is not None:
        lines += _build_comparison(model, comparison)
    return "\n".join(lines) + "\n"


def _build_histogram(latencies: Sequence[int], sum_s: float) -> Iterable[str]:
    name = "edge_agent_inference_seconds"
    yield f"# HELP {name} Time from a complete request to its answer."
    yield f"# TYPE {name} histogram"
    step = 2 * BUCKETS_PER_OCTAVE  # every factor of 4
    for end in range(step, len(latencies) + 1, step):
        yield f'{name}_bucket{{le="{bucket_end_s(end - 1):g}"}} {sum(latencies[:end])}'
    yield f'{name}_bucket{{le="+Inf"}} {sum(latencies)}'
    yield f"{name}_sum {sum_s:.6f}"
    yield f"{name}_count {sum(latencies)}"


def _build_versions(model: str, versions: Sequence[tuple[int, Counts]]) -> Iterable[str]:
    for name, what, number in zip(
        ("active_version", "challenger_version"),
        ("Version of the model that is served.", "Version beside it, answering some or compared."),
        (number for number, _ in versions),
        strict=False,
    ):
        yield from _build(name, what, {f'model="{model}"': number})
    each = {f'model="{model}",version="{number}"': counts for number, counts in versions}
    for name, what, values in (
        ("model_requests_total", "Requests answered.", {labels: found.requests for labels, found in each.items()}),
        (
            "model_request_seconds_total",
            "What they took.",
            {labels: found.requests_ns / 1e9 for labels, found in each.items()},
        ),
        ("model_failures_total", "Requests refused.", {labels: found.failures for labels, found in each.items()}),
        ("model_rows_total", "Rows answered.", {labels: found.rows for labels, found in each.items()}),
        ("model_executions_total", "Runs of the graph.", {labels: found.executions for labels, found in each.items()}),
        (
            "model_execution_seconds_total",
            "What they took.",
            {labels: found.executions_ns / 1e9 for labels, found in each.items()},
        ),
    ):
        yield from _build(name, what, values)


def _build_comparison(model: str, found: Comparison) -> Iterable[str]:
    labels = f'model="{model}"'
    for name, what, value in (
        ("shadow_rows_total", "Rows that champion and challenger both answered.", found.rows),
        ("shadow_agreeing_rows_total", "Those in which the largest outputs are the same.", found.agreeing),
        ("shadow_largest_difference", "Between two of their outputs.", found.largest_difference),
        ("shadow_failures_total", "Requests that the challenger failed.", found.failures),
        ("shadow_dropped_total", "Requests not compared, because too many waited.", found.dropped),
    ):
        yield from _build(name, what, {labels: value})


def _build(name: str, what: str, values: dict[str, int] | dict[str, float]) -> Iterable[str]:
    """Yield one family; `values` by labels."""
    if not values:
        return
    yield f"# HELP edge_agent_{name} {what}"
    yield f"# TYPE edge_agent_{name} {'counter' if name.endswith('_total') else 'gauge'}"
    for labels, value in values.items():
        shown = f"{value:.9g}" if isinstance(value, float) else str(value)
        yield f"edge_agent_{name}{'{' + labels + '}' if labels else ''} {shown}"
