import pytest

from fl_server.rounds.rule import RULE_NAMES, Aggregation
from models.contract.privacy import Unit

ROBUST = [name for name in RULE_NAMES if name != "mean"]


@pytest.mark.parametrize(
    ("rule", "byzantine", "reason"),
    [
        ("mean", 1, "withstands no hostile device"),
        ("mean", -1, "withstands no hostile device"),
        ("average", 0, "must be one of mean, median"),
        *((rule, byzantine, "at least 1") for rule in ROBUST for byzantine in (0, -1)),
    ],
)
def test_rule_that_would_withstand_something_else_than_it_says_is_refused(rule, byzantine, reason):
    with pytest.raises(ValueError, match=reason):
        Aggregation(rule=rule, byzantine=byzantine)


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_rules_are_refused_where_the_noise_is_on_the_sum(rule):
    with pytest.raises(ValueError, match=f"{rule} cannot be combined with the device unit"):
        Aggregation(rule=rule, byzantine=1).check_fits(Unit.DEVICE, devices=100)
    Aggregation().check_fits(Unit.DEVICE, devices=1)


@pytest.mark.parametrize(("rule", "least"), [("median", 5), ("trimmed-mean", 5), ("norm-filter", 5), ("multi-krum", 7)])
def test_run_with_too_few_devices_for_its_rule_is_refused(rule, least):
    aggregation = Aggregation(rule=rule, byzantine=2)
    assert aggregation.least_updates == least
    aggregation.check_fits(Unit.SAMPLE, devices=least)
    with pytest.raises(ValueError, match=f"2 hostile devices of {least} or more, and there are {least - 1}"):
        aggregation.check_fits(Unit.SAMPLE, devices=least - 1)
