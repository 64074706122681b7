"""Who may start training, and when a training process has to go."""

import asyncio
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import edge_agent.gatekeeper as module
from edge_agent.config import AgentSettings, TrainingSettings
from edge_agent.gatekeeper import PAUSE_S, Gatekeeper
from edge_agent.samples.keeper import SampleKeeper
from edge_agent.samples.store import Retention
from edge_agent.training.admission import NOT_NOW
from edge_agent.training.budget import Limits, Spend
from edge_agent.training.ledger import open_ledger
from models.contract.ledger import LedgerHead
from tests.simulators.step_graph import build_privacy

SUPPLY = "sys/class/power_supply/AC"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def settings(tmp_path: Path) -> AgentSettings:
    return AgentSettings(
        device_id="device-1", fleet="f", model="m", state_dir=tmp_path / "state", tuf_root_path=tmp_path / "root.json"
    )


@pytest.fixture
def samples(tmp_path: Path) -> SampleKeeper:
    (tmp_path / "state").mkdir()
    return SampleKeeper(tmp_path / "samples.db", model="m", load_key=lambda _: bytes(32), retention=Retention())


def plug(root: Path, *, online: bool) -> None:
    for folder, files in ((SUPPLY, {"type": "Mains", "online": str(int(online))}), ("B", {"type": "Battery"})):
        directory = (root / SUPPLY).parent / Path(folder).name
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)


def test_training_ends_when_the_charger_is_pulled_and_does_not_flutter(
    tmp_path: Path, settings: AgentSettings, samples: SampleKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WATCH_INTERVAL_S", 0.02)
    settings, clock = replace(settings, training=TrainingSettings(needs_mains=True)), Clock()
    plug(tmp_path, online=True)

    async def scenario() -> None:
        gatekeeper = Gatekeeper(settings, samples, root=tmp_path, clock=clock)
        assert await gatekeeper.find_refusal("run-1") is None
        watching = asyncio.create_task(gatekeeper.wait_for_refusal())
        done, _ = await asyncio.wait({watching}, timeout=0.2)
        assert not done
        plug(tmp_path, online=False)
        assert "training.needs_mains" in await asyncio.wait_for(watching, 20)
        plug(tmp_path, online=True)
        assert await gatekeeper.find_refusal("run-1") == NOT_NOW
        clock.now_s = PAUSE_S
        assert await gatekeeper.find_refusal("run-1") is None

    asyncio.run(scenario())


def test_run_waits_for_new_samples_and_the_same_run_may_go_on(
    tmp_path: Path, settings: AgentSettings, samples: SampleKeeper
) -> None:
    settings = replace(settings, training=TrainingSettings(min_new_samples=2))
    one = [(np.zeros(2, np.float32), np.int64(0))]

    async def ask(run: str, *, trains: bool = False) -> str | None:
        gatekeeper = Gatekeeper(settings, samples, root=tmp_path)  # as after a restart
        reason = await gatekeeper.find_refusal(run)
        if trains:
            gatekeeper.note_trained(run)
            assert gatekeeper._saving is not None
            await gatekeeper._saving
        return reason

    samples.add(one)
    assert asyncio.run(ask("run-1")) == "not admitted here now"
    samples.add(one)
    assert asyncio.run(ask("run-1")) is None
    assert asyncio.run(ask("run-1", trains=True)) is None
    assert asyncio.run(ask("run-1")) is None
    assert asyncio.run(ask("run-2")) == "not admitted here now"
    samples.add(one * 2)
    samples.forget([4])
    assert asyncio.run(ask("run-2")) == "not admitted here now"
    samples.add(one)
    assert asyncio.run(ask("run-2")) is None
    (settings.state_dir / "trained.json").write_bytes(b"damaged")
    assert asyncio.run(ask("run-2")) is None
    samples.close()


def test_spent_budget_starts_no_run_but_one_that_was_paid_before(
    tmp_path: Path, settings: AgentSettings, samples: SampleKeeper
) -> None:
    settings.training_dir.mkdir(parents=True)
    with open_ledger(settings.training_dir / "ledger.jsonl") as ledger:
        ledger.restore(LedgerHead(), settings.privacy.delta, at=1)
        privacy = build_privacy(epsilon=Decimal(1000))
        spend = Spend(order_sequence=1, model="m", run="run-1", round=1, privacy=privacy, steps=2)
        limit = Decimal(1000)
        limits = Limits(epsilon=limit, total_epsilon=limit, delta=settings.privacy.delta, noise_multiplier=Decimal(0))
        spent = ledger.spend(spend, limits, at=1).epsilon_after
    settings = replace(settings, privacy=replace(settings.privacy, epsilon_limit=spent))
    gatekeeper = Gatekeeper(settings, samples, root=tmp_path)
    assert asyncio.run(gatekeeper.find_refusal("run-1")) is None
    assert asyncio.run(gatekeeper.find_refusal("run-2")) == "its privacy budget is spent"


def test_damaged_ledger_starts_nothing(tmp_path: Path, settings: AgentSettings, samples: SampleKeeper) -> None:
    settings.training_dir.mkdir(parents=True)
    (settings.training_dir / "ledger.jsonl").write_bytes(b"damaged\n")
    reason = asyncio.run(Gatekeeper(settings, samples, root=tmp_path).find_refusal("run-1"))
    assert reason is not None
    assert "line 1 of the privacy ledger is damaged" in reason
