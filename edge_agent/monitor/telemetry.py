"""What the device reports of itself; nothing here derives from samples."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from edge_agent.monitor.latency import compute_quantile
from models.contract.messages import Telemetry


def read_rss_mb() -> float:
    """Return this process's resident memory, MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def build_telemetry(
    *,
    model: str,
    version: int | None,
    now_s: float,
    uptime_s: float,
    rss_mb: float,
    latencies: Sequence[int],
    dropped: int,
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
        dropped=dropped,
    )


def _quantile_ms(latencies: Sequence[int], quantile: float) -> float | None:
    seconds = compute_quantile(latencies, quantile)
    return None if seconds is None else round(seconds * 1e3, 4)
