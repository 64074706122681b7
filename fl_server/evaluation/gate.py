"""Whether a candidate becomes the champion. Pure: values in, a decision with its reason out."""

from dataclasses import dataclass
from decimal import Decimal

from fl_server.evaluation.metrics import LOWER_IS_BETTER
from models.contract.manifest import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRules:
    """What the gate asks for, in units of the metric.

    Attributes:
        min_gain: The candidate must be better than the champion by more than this; >= 0.
        quantization_tolerance: What packaging may cost against the float graph; >= 0.
    """

    min_gain: Decimal = Decimal(0)
    quantization_tolerance: Decimal = Decimal("0.03")

    def __post_init__(self) -> None:
        if not (self.min_gain >= 0 and self.quantization_tolerance >= 0):
            raise ValueError("min_gain and quantization_tolerance must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to promote, and why."""

    promote: bool
    reason: str


def decide_promotion(candidate: Quality, champion: Quality | None, rules: GateRules) -> Decision:
    """Return whether `candidate` replaces `champion`; without a champion, any sound candidate does.

    Both are measured on the same held-out data. A lower rmse is better, of other metrics a higher value.
    """
    if not (candidate.value.is_finite() and candidate.float_value.is_finite()):
        return _refuse(f"{candidate.metric} is not finite")
    lost = _gain(candidate.metric, candidate.float_value, candidate.value)
    if lost > rules.quantization_tolerance:
        return _refuse(
            f"quantization costs {lost} {candidate.metric} ({candidate.float_value} -> {candidate.value}), "
            f"tolerated are {rules.quantization_tolerance}"
        )
    if champion is None:
        return Decision(promote=True, reason=f"first version, {candidate.metric} {candidate.value}")
    if champion.metric != candidate.metric:
        return _refuse(f"measured {candidate.metric}, the champion {champion.metric}")
    gained = _gain(candidate.metric, candidate.value, champion.value)
    between = f"{candidate.metric} {champion.value} -> {candidate.value}"
    if gained > rules.min_gain:
        return Decision(promote=True, reason=f"{between}, better by {gained}")
    return _refuse(f"{between} is not better by more than {rules.min_gain}")


def find_drop(metric: str, candidate: Decimal, champion: Decimal, *, max_drop: Decimal) -> str | None:
    """Return how much worse than `champion` the metric of `candidate` is, None if by at most `max_drop`.

    Both are measured on the same held-out data.
    """
    lost = _gain(metric, champion, candidate)
    if lost <= max_drop:  # False for what is not finite
        return None
    return f"{metric} {champion} -> {candidate} on held-out data, worse by {lost}; {max_drop} is the most"


def _gain(metric: str, value: Decimal, than: Decimal) -> Decimal:
    """Return by how much `value` is better."""
    return than - value if metric in LOWER_IS_BETTER else value - than


def _refuse(reason: str) -> Decision:
    return Decision(promote=False, reason=reason)
