"""What a loaded version has done since it was loaded: counts that only rise.

Adding is not locked. One thread, the event loop, does nearly all of it, and a count lost once in a while to
another thread is worth less than a lock in every request.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsSnapshot:
    """The counts at one time; durations in ns, as in Triton's statistics extension.

    Attributes:
        requests, requests_ns: Answered, and what they took from request to answer.
        failures, failures_ns: Refused or failed.
        rows: In the answered requests.
        executions, executions_ns: Runs of the graph; fewer than requests where some ran as one batch.
        last_ms: When the last request was answered, ms since 1970; 0 before the first.
    """

    requests: int
    requests_ns: int
    failures: int
    failures_ns: int
    rows: int
    executions: int
    executions_ns: int
    last_ms: int


class ModelStatistics:
    """The counts of one version."""

    __slots__ = (
        "_executions",
        "_executions_ns",
        "_failures",
        "_failures_s",
        "_last_s",
        "_requests",
        "_requests_s",
        "_rows",
    )

    def __init__(self) -> None:
        self._requests = self._failures = self._rows = self._executions = self._executions_ns = 0
        self._requests_s = self._failures_s = self._last_s = 0.0

    def record(self, rows: int, duration_s: float) -> None:
        """Count one answered request of `rows` rows."""
        self._requests += 1
        self._rows += rows
        self._requests_s += duration_s
        self._last_s = time.time()

    def record_failure(self, duration_s: float) -> None:
        """Count one request that was not answered."""
        self._failures += 1
        self._failures_s += duration_s

    def record_execution(self, duration_ns: int) -> None:
        """Count one run of the graph."""
        self._executions += 1
        self._executions_ns += duration_ns

    def snapshot(self) -> StatisticsSnapshot:
        """Return the counts as they are now."""
        return StatisticsSnapshot(
            requests=self._requests,
            requests_ns=round(self._requests_s * 1e9),
            failures=self._failures,
            failures_ns=round(self._failures_s * 1e9),
            rows=self._rows,
            executions=self._executions,
            executions_ns=self._executions_ns,
            last_ms=round(self._last_s * 1e3),
        )
