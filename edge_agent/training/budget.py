"""Whether a round may be charged: the limits of its plan and of the device's owner, over all that was spent.

Pure.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from edge_agent.errors import StalledError
from edge_agent.training.accountant import Phase, compute_epsilon
from models.contract.ledger import SPENT_MAX, Spent, add_up
from models.contract.privacy import PrivacyPlan, Unit

ROUND_SPENDS_MAX = 3  # of one round: whoever loses updates, or says so, must not drain the budget with one round
_UPWARDS = Context(prec=10, rounding=ROUND_CEILING)


class BudgetError(StalledError):
    """A spend would cross a limit: `asked` would be reached, `limit` is allowed."""

    def __init__(self, message: str, *, asked: Decimal, limit: Decimal) -> None:
        super().__init__(message)
        self.asked = asked
        self.limit = limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The owner's own, over any plan.

    Attributes:
        epsilon: Largest total of one model, over all runs.
        total_epsilon: Largest total over all models together.
        delta: At which these totals are computed.
        noise_multiplier: Least z of any spend.
    """

    epsilon: Decimal
    total_epsilon: Decimal
    delta: Decimal
    noise_multiplier: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What one round of a run asks for, and the sequence number of the order that asks.

    Attributes:
        steps: As `PrivacyPlan.count_charged_steps` has it; 0 where all is paid.
    """

    order_sequence: int
    model: str
    run: str
    round: int
    privacy: PrivacyPlan
    steps: int

    @property
    def phase(self) -> Phase:
        """What the accountant needs of it."""
        return Phase(float(self.sampling_rate), float(self.privacy.noise_multiplier), self.steps)

    @property
    def sampling_rate(self) -> Decimal:
        """As it is charged."""
        return self.privacy.claimed_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger.

    Attributes:
        sequence: Counts up from 1.
        at: Unix time, s.
        order_sequence: Of the order that was acted on; 0 for what was taken from the coordinator's copy, as is `round`.
        steps: Of unit device those of all rounds that the run planned, at the first that asked; 0 for the others.
        delta: The owner's, at which both epsilons are stated, of all entries of the model up to here.
        previous: Digest of the entry before.
        restored_from: Digest of the last entry of the ledger that the coordinator had a copy of; None for a spend.
        restored_left: Entries from the copy that follow this one: until they are there, the ledger is not whole.
    """

    schema_version: Literal[1] = 1
    sequence: int
    at: int
    order_sequence: int
    model: str
    run: str
    round: int
    unit: Unit = Unit.SAMPLE
    sampling_rate: Decimal
    noise_multiplier: Decimal
    steps: int
    delta: Decimal
    epsilon_before: Decimal
    epsilon_after: Decimal
    previous: str
    restored_from: str | None = None
    restored_left: int = 0

    @property
    def phase(self) -> Phase:
        """What the accountant needs of it."""
        return Phase(float(self.sampling_rate), float(self.noise_multiplier), self.steps)


def compute_total(spends: Iterable[Entry | Spend], delta: Decimal) -> Decimal:
    """Return the epsilon of all `spends` together at `delta`, rounded up."""
    return _UPWARDS.create_decimal_from_float(compute_epsilon([spend.phase for spend in spends], float(delta)))


def count_spent(entries: Iterable[Entry]) -> tuple[Spent, ...]:
    """Return the steps in `entries`, by model and kind."""
    return add_up(
        Spent(
            model=entry.model,
            sampling_rate=entry.sampling_rate,
            noise_multiplier=entry.noise_multiplier,
            steps=entry.steps,
        )
        for entry in entries
        if entry.steps
    )


def settle(entries: Iterable[Entry], spend: Spend) -> Spend:
    """Return what of `spend` is still to be paid, given all `entries`.

    A run of unit `device` is paid as a whole by the first round that asks. It pays anew for other numbers than those,
    and after a reinstall, for a copy does not say what a run has paid.
    """
    paid = {
        (entry.sampling_rate, entry.noise_multiplier, entry.steps)
        for entry in entries
        if (entry.model, entry.run, entry.unit) == (spend.model, spend.run, Unit.DEVICE)
    }
    is_paid = (spend.sampling_rate, spend.privacy.noise_multiplier, spend.steps) in paid
    return replace(spend, steps=0) if spend.privacy.unit is Unit.DEVICE and is_paid else spend


def decide_spend(entries: Iterable[Entry], spend: Spend, limits: Limits) -> tuple[Decimal, Decimal]:
    """Return the model's total epsilon before and after `spend`, given all `entries`.

    Raises:
        BudgetError: It crosses the owner's limits, or what its plan allows the run, or asks for a round too often.
    """
    privacy, entries = spend.privacy, list(entries)
    of_model = [entry for entry in entries if entry.model == spend.model]
    of_run = [entry for entry in of_model if entry.run == spend.run]
    if privacy.noise_multiplier < limits.noise_multiplier:
        raise BudgetError(
            f"noise multiplier {privacy.noise_multiplier} is below the owner's least, {limits.noise_multiplier}",
            asked=privacy.noise_multiplier,
            limit=limits.noise_multiplier,
        )
    times = sum(entry.round == spend.round for entry in of_run)
    _check(
        Decimal(times + 1),
        Decimal(ROUND_SPENDS_MAX),
        f"round {spend.round} of run {spend.run!r} would be charged {{asked}} times, at most {{limit}} are allowed",
    )
    if privacy.unit is Unit.SAMPLE:  # of the other it is by PLD that the plan allows epsilon, and RDP says more
        _check(
            compute_total([*of_run, spend], privacy.delta),
            privacy.epsilon,
            f"run {spend.run!r} would reach epsilon {{asked}}, its plan allows {{limit}}",
        )
    total = compute_total([*of_model, spend], limits.delta)
    _check(
        total,
        limits.epsilon,
        f"model {spend.model!r} would reach epsilon {{asked}} in all, its owner allows {{limit}}",
    )
    _check(
        compute_total([*entries, spend], limits.delta),
        limits.total_epsilon,
        "all models together would reach epsilon {asked}, their owner allows {limit}",
    )
    kinds = {(entry.model, entry.sampling_rate, entry.noise_multiplier) for entry in entries}
    kinds.add((spend.model, spend.sampling_rate, privacy.noise_multiplier))
    _check(
        Decimal(len(kinds)),
        Decimal(SPENT_MAX),
        "the ledger would hold {asked} different pairs of sampling rate and noise, its copy has room for {limit}",
    )
    return compute_total(of_model, limits.delta), total


def _check(asked: Decimal, limit: Decimal, message: str) -> None:
    if asked > limit:
        raise BudgetError(message.format(asked=asked, limit=limit), asked=asked, limit=limit)
