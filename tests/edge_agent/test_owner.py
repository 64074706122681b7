"""The owner reads in plain words what the ledger on disk says."""

from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.config import AgentSettings, PrivacySettings
from edge_agent.errors import StalledError
from edge_agent.owner import build_privacy_text, load_privacy_report, parse_privacy_report
from edge_agent.training.budget import Limits, Spend
from edge_agent.training.ledger import open_ledger
from models.contract.encoding import build_json
from models.contract.ledger import LedgerHead
from tests.simulators.step_graph import build_privacy


@pytest.fixture
def settings(tmp_path: Path) -> AgentSettings:
    (tmp_path / "training").mkdir()
    privacy = PrivacySettings(epsilon_limit=Decimal(50), noise_multiplier_limit=Decimal("0.5"))
    return AgentSettings(
        device_id="d", fleet="f", model="m", state_dir=tmp_path, tuf_root_path=tmp_path / "root.json", privacy=privacy
    )


def spend(settings: AgentSettings, model: str, run: str, round_number: int) -> Decimal:
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
        privacy=build_privacy(epsilon=Decimal(1000)),
        steps=2,
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
    assert f"m: epsilon {total:f} of 50 is spent, at delta 0.001, in 3 rounds of 2 runs." in text
    assert "below 0.5 are refused" in text


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
