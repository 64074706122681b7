"""How long to wait before the next attempt, so that a fleet does not come back in one wave."""

from random import Random


def full_jitter(attempt: int, *, base_s: float, cap_s: float, generator: Random) -> float:
    """Return a delay, uniform in [0, min(cap_s, base_s * 2**attempt)] s.

    Args:
        attempt: Failures so far in a row; >= 0.
        base_s: Largest delay of attempt 0; > 0.
        cap_s: Largest delay of all; >= base_s.
        generator: Source of the jitter.

    Source:
        Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015 ("full jitter").
    """
    return generator.uniform(0, min(cap_s, base_s * 2.0 ** min(attempt, 32)))
