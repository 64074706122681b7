"""What the owner's limits allow, over all models and however often a round is asked for."""

from dataclasses import replace
from decimal import Decimal

import pytest

from edge_agent.training.budget import ROUND_SPENDS_MAX, BudgetError, Entry, Limits, Spend, compute_total, decide_spend
from models.contract.ledger import SPENT_MAX
from tests.simulators.step_graph import build_privacy

LIMITS = Limits(epsilon=Decimal(50), total_epsilon=Decimal(80), delta=Decimal("0.001"), noise_multiplier=Decimal(0))


def build_spend(number: int = 1, *, model: str = "digits", run: str = "run-1", noise: str = "1") -> Spend:
    privacy = build_privacy(epsilon="1000", noise_multiplier=noise)
    return Spend(order_sequence=number, model=model, run=run, round=number, privacy=privacy, steps=20)


def charge(*spends: Spend, limits: Limits = LIMITS) -> list[Entry]:
    """Return the entries of `spends`, each of which must be allowed after those before it."""
    entries: list[Entry] = []
    for spend in spends:
        before, after = decide_spend(entries, spend, limits)
        entries.append(
            Entry(
                sequence=len(entries) + 1,
                at=0,
                order_sequence=spend.order_sequence,
                model=spend.model,
                run=spend.run,
                round=spend.round,
                sampling_rate=spend.privacy.sampling_rate,
                noise_multiplier=spend.privacy.noise_multiplier,
                steps=spend.steps,
                delta=limits.delta,
                epsilon_before=before,
                epsilon_after=after,
                previous="",
            )
        )
    return entries


def test_models_share_the_owners_total_and_each_keeps_within_its_own_limit() -> None:
    spends = [build_spend(1), build_spend(2, model="other")]
    together = compute_total(spends, LIMITS.delta)
    alone = compute_total(spends[:1], LIMITS.delta)
    assert alone < together
    charge(*spends, limits=replace(LIMITS, epsilon=alone, total_epsilon=together))
    with pytest.raises(BudgetError, match=r"all models together would reach epsilon .* their owner allows") as caught:
        charge(*spends, limits=replace(LIMITS, epsilon=alone, total_epsilon=together - Decimal("1e-9")))
    assert caught.value.asked == together


def test_round_is_charged_three_times_at_most_whatever_the_budget() -> None:
    spends = [replace(build_spend(2), order_sequence=sequence) for sequence in range(1, ROUND_SPENDS_MAX + 2)]
    entries = charge(*spends[:-1])
    assert len(entries) == 3
    with pytest.raises(BudgetError, match="round 2 of run 'run-1' would be charged 4 times, at most 3 are allowed"):
        decide_spend(entries, spends[-1], LIMITS)
    decide_spend(entries, build_spend(3), LIMITS)
    decide_spend(entries, build_spend(2, run="run-2"), LIMITS)


def test_ledger_that_no_copy_could_hold_is_never_written() -> None:
    limits = replace(LIMITS, epsilon=Decimal(1000), total_epsilon=Decimal(1000))
    entries = charge(
        *(build_spend(number, run=f"run-{number}", noise=str(9 + number)) for number in range(1, SPENT_MAX + 1)),
        limits=limits,
    )
    with pytest.raises(BudgetError, match="its copy has room for 64"):
        decide_spend(entries, build_spend(99, run="run-99", noise="99"), limits)
    decide_spend(entries, build_spend(99, run="run-99", noise="10.0"), limits)
