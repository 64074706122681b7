from dataclasses import replace
from decimal import Decimal

from fl_server.privacy.calibration import build_privacy_plan
from fl_server.privacy.statement import build_statement
from models.contract.privacy import Unit

PLAN = build_privacy_plan(
    unit=Unit.SAMPLE,
    clipping_norm=Decimal(1),
    sampling_rate=Decimal("0.1"),
    delta=Decimal("0.001"),
    epsilon=Decimal(4),
    steps=5,
    rounds=4,
)


def test_statement_grows_with_every_round_and_ends_within_the_budget():
    spent = [build_statement(PLAN, steps=5, rounds_done=done, cohort=8).epsilon for done in range(5)]
    assert spent[0] == 0
    assert sorted(set(spent)) == spent
    assert Decimal("3.9") < spent[-1] <= PLAN.epsilon


def test_statement_names_unit_cohort_and_whom_one_must_trust():
    statement = build_statement(PLAN, steps=5, rounds_done=1, cohort=8)
    assert statement.unit == "sample"
    assert statement.delta == PLAN.delta
    assert statement.expected_cohort == 8
    assert "offline signer" in statement.trust_model


def test_version_that_saw_no_private_data_claims_no_cohort():
    assert build_statement(PLAN, steps=5, rounds_done=0, cohort=8).expected_cohort == 0


def test_statement_of_the_device_unit_counts_rounds_and_says_what_its_sampling_rate_assumes():
    plan = replace(PLAN, unit=Unit.DEVICE, noise_multiplier=Decimal(1))
    hidden = build_statement(plan, steps=5, rounds_done=4, cohort=80)
    visible = build_statement(replace(plan, participation="visible"), steps=5, rounds_done=4, cohort=80)
    assert hidden == build_statement(plan, steps=500, rounds_done=4, cohort=80)  # whatever devices do
    assert (hidden.unit, hidden.expected_cohort) == ("device", 80)
    assert "PLD" in hidden.accountant
    assert "trusting the coordinator" in hidden.trust_model
    assert "nobody but the coordinator sees which devices took part" in hidden.trust_model
    assert "no amplification" in visible.trust_model
    assert visible.epsilon > 3 * hidden.epsilon
