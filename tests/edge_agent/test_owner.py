"""The owner reads in plain words what the ledger on disk says."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.config import AgentSettings, PrivacySettings
from edge_agent.errors import StalledError
from edge_agent.owner import build_privacy_text, load_privacy_report, parse_privacy_report
from edge_agent.training.budget import Limits, Spend
from edge_agent.training.ledger import open_ledger
from models.contract.encoding import build_json
from models.contract.ledger import LedgerHead, Spent
from models.contract.privacy import Unit
from tests.simulators.step_graph import build_privacy


@pytest.fixture
def settings(tmp_path: Path) -> AgentSettings:
    (tmp_path / "training").mkdir()
    privacy = PrivacySettings(
        epsilon_limit=Decimal(50), total_epsilon_limit=Decimal(60), noise_multiplier_limit=Decimal("0.5")
    )
    return AgentSettings(
        device_id="d", fleet="f", model="m", state_dir=tmp_path, tuf_root_path=tmp_path / "root.json", privacy=privacy
    )


def spend(
    settings: AgentSettings, model: str, run: str, round_number: int, *, unit: Unit = Unit.SAMPLE, steps: int = 2
) -> Decimal:
    limits = Limits(
        epsilon=Decimal(1000),
        total_epsilon=Decimal(1000),
        delta=settings.privacy.delta,
        noise_multiplier=Decimal(0),
    )
    asked = Spend(
        order_sequence=1,
        model=model,
        run=run,
        round=round_number,
        privacy=build_privacy(epsilon=Decimal(1000), unit=unit),
        steps=steps,
    )
    with open_ledger(settings.training_dir / "ledger.jsonl") as ledger:
        ledger.restore(LedgerHead(), settings.privacy.delta, at=1)
        return ledger.spend(asked, limits, at=1).epsilon_after


def test_report_adds_up_by_model_over_all_runs(settings: AgentSettings) -> None:
    spend(settings, "m", "run-1", 1)
    spend(settings, "other", "run-1", 1)
    spend(settings, "m", "run-1", 2)
    total = spend(settings, "m", "run-2", 1)
    report = load_privacy_report(settings)
    of_model = {spent.model: spent for spent in report.spent}
    assert (of_model["m"].epsilon, of_model["m"].runs, of_model["m"].rounds) == (total, 2, 3)
    assert (of_model["other"].runs, of_model["other"].rounds) == (1, 1)
    text = build_privacy_text(parse_privacy_report(build_json(report)))
    left = Decimal(50) - total
    assert f"m: epsilon {total:f} of 50 is spent, {left:f} is left, at delta 0.001, in 3 rounds of 2 runs." in text
    assert report.total_epsilon > total
    assert f"lifetime: epsilon {report.total_epsilon:f} of 60 is spent, {report.total_left:f} is left." in text
    assert "1970-01-01 00:00 UTC  m, round 1 of run run-2: 2 steps, sampling rate 0.1, noise 1, epsilon" in text
    assert [line.run for line in report.last] == ["run-1"] * 3 + ["run-2"]
    assert "loses more than k times as much" in text
    assert "below 0.5 are refused" in text


def test_run_of_the_device_unit_is_told_as_paid_once_to_an_owner_who_trusts_the_coordinator(
    settings: AgentSettings,
) -> None:
    assert "trust the coordinator" not in build_privacy_text(load_privacy_report(settings))
    for number in (3, 4):
        spend(settings, "m", "run-1", number, unit=Unit.DEVICE, steps=20)
    trusting = replace(settings, privacy=replace(settings.privacy, trust_coordinator=True))
    text = build_privacy_text(load_privacy_report(trusting))
    assert "round 3 of run run-1: unit device, all 20 rounds of the run, sampling rate 0.1" in text
    assert "round 4 of run run-1: unit device, already paid" in text
    assert "You trust the coordinator" in text


def test_line_that_is_being_written_is_not_read(settings: AgentSettings) -> None:
    total = spend(settings, "m", "run-1", 1)
    with (settings.training_dir / "ledger.jsonl").open("ab") as file:
        file.write(b'{"half a line')
    assert [spent.epsilon for spent in load_privacy_report(settings).spent] == [total]


def test_damaged_ledger_is_an_error_and_no_number(settings: AgentSettings) -> None:
    spend(settings, "m", "run-1", 1)
    path = settings.training_dir / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":9') + path.read_bytes())
    with pytest.raises(StalledError, match="ledger"):
        load_privacy_report(settings)


def test_missing_ledger_says_that_nothing_is_spent(settings: AgentSettings) -> None:
    assert "Nothing is spent" in build_privacy_text(load_privacy_report(settings))


def test_what_was_restored_is_told_apart_from_what_was_trained_here(settings: AgentSettings) -> None:
    kind = Spent(model="m", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(2), steps=30)
    with open_ledger(settings.training_dir / "ledger.jsonl") as ledger:
        ledger.restore(LedgerHead(entries=3, digest="a" * 64, spent=(kind,)), settings.privacy.delta, at=1)
    total = spend(settings, "m", "run-1", 1)
    report = load_privacy_report(settings)
    (of_model,) = report.spent
    assert (of_model.epsilon, of_model.runs, of_model.rounds, of_model.restored) == (total, 1, 1, 1)
    text = build_privacy_text(report)
    assert "in 1 rounds of 1 runs, 1 entries as the coordinator remembered them." in text
    assert "m, the coordinator's copy: 30 steps" in text
