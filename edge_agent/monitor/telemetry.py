"""What the device reports of itself, and what a scraper reads; nothing here derives from samples."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from edge_agent.monitor.latency import BUCKETS_PER_OCTAVE, bucket_end_s, compute_quantile
from models.contract.manifest import ModelManifest
from models.contract.messages import Telemetry


def read_rss_mb() -> float:
    """Return this process's resident memory, MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def build_telemetry(
    *, model: str, version: int | None, now_s: float, uptime_s: float, rss_mb: float, latencies: Sequence[int]
) -> Telemetry:
    """Return the report on the answers counted in `latencies`, a difference of histogram snapshots."""
    return Telemetry(
        id=uuid.uuid4().hex,
        sent_at=now_s,
        uptime_s=round(uptime_s, 1),
        rss_mb=round(rss_mb, 1),
        model=model,
        version=version,
        latency_p50_ms=_quantile_ms(latencies, 0.5),
        latency_p99_ms=_quantile_ms(latencies, 0.99),
    )


def build_metrics(
    *, latencies: Sequence[int], sum_s: float, failures: int, rss_mb: float, manifest: ModelManifest | None
) -> str:
    """Return the device's state in the Prometheus text format 0.0.4."""
    lines = [
        "# HELP edge_agent_inference_seconds Time from a complete request to its answer.",
        "# TYPE edge_agent_inference_seconds histogram",
    ]
    step = 2 * BUCKETS_PER_OCTAVE  # every factor of 4
    for end in range(step, len(latencies) + 1, step):
        bound_s = bucket_end_s(end - 1)
        lines.append(f'edge_agent_inference_seconds_bucket{{le="{bound_s:g}"}} {sum(latencies[:end])}')
    lines += [
        f'edge_agent_inference_seconds_bucket{{le="+Inf"}} {sum(latencies)}',
        f"edge_agent_inference_seconds_sum {sum_s:.6f}",
        f"edge_agent_inference_seconds_count {sum(latencies)}",
        "# HELP edge_agent_inference_failures_total Inference requests that were refused.",
        "# TYPE edge_agent_inference_failures_total counter",
        f"edge_agent_inference_failures_total {failures}",
        "# HELP edge_agent_resident_memory_bytes Resident memory of the agent.",
        "# TYPE edge_agent_resident_memory_bytes gauge",
        f"edge_agent_resident_memory_bytes {rss_mb * 1e6:.0f}",
    ]
    if manifest is not None:
        lines += [
            "# HELP edge_agent_active_version Version of the model that is served.",
            "# TYPE edge_agent_active_version gauge",
            f'edge_agent_active_version{{model="{manifest.model}"}} {manifest.version}',
        ]
    return "\n".join(lines) + "\n"


def _quantile_ms(latencies: Sequence[int], quantile: float) -> float | None:
    seconds = compute_quantile(latencies, quantile)
    return None if seconds is None else round(seconds * 1e3, 4)
