import re
from decimal import Decimal

import pytest

from fl_server.evaluation.gate import GateRules, decide_promotion
from models.contract.manifest import Quality


def measured(value, exact=None, metric="accuracy"):
    exact = value if exact is None else exact
    return Quality(
        metric=metric, value=Decimal(value), samples=200, float_value=Decimal(exact), logit_deviation=Decimal(0)
    )


@pytest.mark.parametrize(
    ("candidate", "champion", "promote", "reason"),
    [
        (measured("0.90"), None, True, "first version, accuracy 0.90"),
        (measured("0.90"), measured("0.88"), True, "accuracy 0.88 -> 0.90, better by 0.02"),
        (measured("0.88"), measured("0.88"), False, "accuracy 0.88 -> 0.88 is not better by more than 0"),
        (measured("0.80"), measured("0.88"), False, "not better"),
        (measured("0.90", "0.93"), measured("0.88"), True, "better by 0.02"),
        (measured("0.90", "0.94"), measured("0.10"), False, r"quantization costs 0.04 accuracy \(0.94 -> 0.90\)"),
        (measured("0.50", "0.94"), None, False, "quantization costs 0.44"),
        (measured("0.94", "0.50"), None, True, "first version"),
        (measured("2.0", metric="rmse"), measured("2.5", metric="rmse"), True, "rmse 2.5 -> 2.0, better by 0.5"),
        (measured("2.5", metric="rmse"), measured("2.0", metric="rmse"), False, "not better"),
        (measured("2.5", "2.0", metric="rmse"), measured("9", metric="rmse"), False, "quantization costs 0.5 rmse"),
        (measured("NaN"), measured("0.1"), False, "accuracy is not finite"),
        (measured("0.9", "Infinity"), None, False, "accuracy is not finite"),
        (measured("0.9", metric="auc"), measured("0.8"), False, "measured auc, the champion accuracy"),
    ],
)
def test_gate_promotes_only_what_is_sound_and_better(candidate, champion, promote, reason):
    decision = decide_promotion(candidate, champion, GateRules())
    assert decision.promote is promote
    assert re.search(reason, decision.reason)


def test_gate_asks_for_the_gain_and_tolerates_the_loss_that_its_rules_say():
    rules = GateRules(min_gain=Decimal("0.05"), quantization_tolerance=Decimal("0.2"))
    assert not decide_promotion(measured("0.85"), measured("0.80"), rules).promote
    assert decide_promotion(measured("0.86", "1.0"), measured("0.80"), rules).promote


def test_rules_that_would_promote_losses_cannot_be_built():
    with pytest.raises(ValueError, match="must be >= 0"):
        GateRules(min_gain=Decimal("-0.1"))
    with pytest.raises(ValueError, match="must be >= 0"):
        GateRules(quantization_tolerance=Decimal(-1))
