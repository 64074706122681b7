"""How long answers took: a histogram of fixed size, exact in number, within 9 % in time."""

import math
from collections.abc import Sequence
from itertools import accumulate

BUCKETS_PER_OCTAVE = 4
_FLOOR_S = 1e-6
_BUCKETS = 26 * BUCKETS_PER_OCTAVE  # 1 us to 67 s


class LatencyHistogram:
    """Counts that only rise; what happened in between is the difference of two snapshots."""

    def __init__(self) -> None:
        self.sum_s = 0.0
        self._counts = [0] * _BUCKETS

    def record(self, seconds: float) -> None:
        bucket = int(math.log2(max(seconds, _FLOOR_S) / _FLOOR_S) * BUCKETS_PER_OCTAVE)
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.sum_s += seconds

    def snapshot(self) -> tuple[int, ...]:
        """Return how many answers fell into each bucket so far."""
        return tuple(self._counts)


def bucket_end_s(bucket: int) -> float:
    """Return where `bucket` of a snapshot ends, s."""
    return _FLOOR_S * math.exp2((bucket + 1) / BUCKETS_PER_OCTAVE)


def subtract(later: Sequence[int], earlier: Sequence[int]) -> tuple[int, ...]:
    """Return the counts of what happened between two snapshots."""
    return tuple(new - old for new, old in zip(later, earlier, strict=True))


def compute_quantile(counts: Sequence[int], quantile: float) -> float | None:
    """Return the latency, s, that a share of `quantile` in (0, 1] did not exceed; None without answers."""
    rank = math.ceil(quantile * sum(counts))
    if rank == 0:
        return None
    bucket = next(bucket for bucket, total in enumerate(accumulate(counts)) if total >= rank)
    return bucket_end_s(bucket) * math.exp2(-0.5 / BUCKETS_PER_OCTAVE)  # the middle of the bucket
