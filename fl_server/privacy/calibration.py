"""How much noise keeps a run within its budget, found with dp-accounting.

Of unit `sample` by RDP, as devices account for themselves and must not find more; of unit `device` by PLD, which is
tighter, and whose steps are the run's rounds.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_UP, Decimal
from functools import lru_cache

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fl_server.errors import UsageError
from models.contract.privacy import Participation, PrivacyPlan, Unit

MARGIN = Decimal("0.995")  # the device's own accountant interpolates orders differently and must not say more
NOISE_STEP = Decimal("0.0001")
NOISE_MAX = Decimal(1000)  # beyond it nothing is learnt from any cohort
_EPSILON_STEP = Decimal("0.0001")
_PLD_INTERVAL = 1e-3  # of the privacy loss, rounded up: ten times the default and a tenth of the time
_PLD_STEP = Decimal("0.001")  # of the noise multiplier
# Renyi orders: each alone bounds epsilon, the best of many bounds it tightly. Whole ones cost a hundredth of others.
_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *map(float, range(11, 64)), 128.0, 256.0, 512.0, 1024.0)
_QUICK_ORDERS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 16.0, 24.0, 32.0, 48.0, 63.0, 128.0, 256.0)
_NEIGHBOURS = 2  # orders on each side of the best that are tried beside it: it moves a little with the noise


# It warns of each order that it leaves out, which can only raise the bound: a line for each noise that is tried.
logging.getLogger("absl").addFilter(lambda record: "dp_accounting" not in record.pathname)


def build_privacy_plan(
    *,
    unit: Unit,
    clipping_norm: Decimal,
    sampling_rate: Decimal,
    delta: Decimal,
    epsilon: Decimal,
    steps: int,
    rounds: int,
    participation: Participation = "hidden",
) -> PrivacyPlan:
    """Return the plan of `unit` whose `rounds` of `steps` steps spend at most `epsilon` at `delta`.

    Raises:
        UsageError: No noise can keep this budget, or a value is out of range.
    """
    try:
        bound = PrivacyPlan(
            unit=unit,
            clipping_norm=clipping_norm,
            noise_multiplier=Decimal(0),
            sampling_rate=sampling_rate,
            delta=delta,
            epsilon=epsilon,
            participation=participation,
        )
    except ValueError as error:
        raise UsageError(f"privacy: {error}") from error
    if steps < 1 or rounds < 1:
        raise UsageError(f"privacy: {rounds} rounds of {steps} steps, both must be >= 1")
    rate = bound.claimed_rate
    noise_multiplier = calibrate_noise_multiplier(
        sampling_rate=rate, steps=count_steps(unit, steps) * rounds, delta=delta, epsilon=epsilon
    )
    if unit is Unit.DEVICE:
        noise_multiplier = _lower_noise(noise_multiplier, rate, rounds, delta, epsilon)
    return replace(bound, noise_multiplier=noise_multiplier)


def count_steps(unit: Unit, steps: int) -> int:
    """Return how many steps of the mechanism a round of `steps` training steps is."""
    return steps if unit is Unit.SAMPLE else 1


def _lower_noise(noise: Decimal, sampling_rate: Decimal, rounds: int, delta: Decimal, epsilon: Decimal) -> Decimal:
    """Return less noise than `noise` that keeps the budget by PLD, to `_PLD_STEP`; `noise` where none is found."""

    def keeps_budget(steps: int) -> bool:
        phase = Phase(sampling_rate=sampling_rate, noise_multiplier=noise - steps * _PLD_STEP, steps=rounds)
        return compute_pld_epsilon((phase,), delta) <= float(epsilon * MARGIN)

    low, high = 0, int(noise / 2 / _PLD_STEP)  # PLD never saves half
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keeps_budget(middle) else (low, middle - 1)
    return noise - low * _PLD_STEP


def calibrate_noise_multiplier(*, sampling_rate: Decimal, steps: int, delta: Decimal, epsilon: Decimal) -> Decimal:
    """Return the least noise multiplier, to 4 decimals, that spends at most 0.995 of `epsilon` at `delta`.

    Args:
        sampling_rate: Poisson, of each step; (0, 1].
        steps: All steps of the run; >= 1.
        delta: (0, 1).
        epsilon: > 0.

    Raises:
        UsageError: Even the largest noise would spend more.
    """
    target = float(epsilon * MARGIN)

    def spend(noise: int, orders: Sequence[float]) -> tuple[float, float]:
        phase = Phase(sampling_rate=sampling_rate, noise_multiplier=noise * NOISE_STEP, steps=steps)
        return _compute_epsilon((phase,), delta, orders)

    def find_least(orders: Sequence[float], high: int) -> int:
        return _find_least(lambda noise: spend(noise, orders)[0] <= target, high)

    high = int(NOISE_MAX / NOISE_STEP)  # in steps of the noise multiplier, as all noise here
    if spend(high, _QUICK_ORDERS)[0] <= target:
        high = find_least(_QUICK_ORDERS, high)
        best = spend(high, _QUICK_ORDERS)[1]
    elif spend(high, _ORDERS)[0] <= target:
        best = spend(high, _ORDERS)[1]
    else:
        raise UsageError(
            f"epsilon {epsilon} at delta {delta} cannot be kept over {steps} steps with a sampling rate of "
            f"{sampling_rate}, whatever the noise: allow a larger epsilon or delta, or ask for fewer steps"
        )
    while True:  # less noise has another best order, and that one in turn may do with less
        around = [order for order in _ORDERS if best / 2 <= order <= 2 * best]
        best = spend(high, around)[1]
        middle = _ORDERS.index(best)
        near = _ORDERS[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS + 1]
        least = find_least(near, high)
        if least == high:
            return high * NOISE_STEP
        high = least


def _find_least(keeps_budget: Callable[[int], bool], high: int) -> int:
    """Return the least noise above 0 that keeps the budget; `high` does, and all between them."""
    stride, low = 1, high - 1  # down from `high` in strides that double, for it is often near; then by halves
    while low > 0 and keeps_budget(low):
        high, stride = low, 2 * stride
        low = max(0, high - stride)
    while high - low > 1:
        middle = (low + high) // 2
        if keeps_budget(middle):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Poisson-sampled Gaussian steps that were taken alike; `steps` may be 0."""

    sampling_rate: Decimal
    noise_multiplier: Decimal
    steps: int


@lru_cache(maxsize=256)
def compute_epsilon(phases: tuple[Phase, ...], delta: Decimal) -> float:
    """Return what all `phases` together spend at `delta`, when a record is added or removed."""
    return _compute_epsilon(phases, delta, _ORDERS)[0]


@lru_cache(maxsize=256)
def compute_pld_epsilon(phases: tuple[Phase, ...], delta: Decimal) -> float:
    """Return the same, never less than it is, by the distribution of the privacy loss."""
    accountant = PLDAccountant(value_discretization_interval=_PLD_INTERVAL)
    for phase in phases:
        if phase.steps:
            step = PoissonSampledDpEvent(float(phase.sampling_rate), GaussianDpEvent(float(phase.noise_multiplier)))
            accountant.compose(SelfComposedDpEvent(step, phase.steps))
    return float(accountant.get_epsilon(float(delta)))


def _compute_epsilon(phases: Iterable[Phase], delta: Decimal, orders: Sequence[float]) -> tuple[float, float]:
    """Return an upper bound of what is spent, and the one of `orders` that gives it."""
    steps: Counter[PoissonSampledDpEvent] = Counter()
    for phase in phases:
        step = GaussianDpEvent(float(phase.noise_multiplier))
        steps[PoissonSampledDpEvent(float(phase.sampling_rate), step)] += phase.steps
    accountant = RdpAccountant(orders)
    for step, count in steps.items():
        if count:
            accountant.compose(SelfComposedDpEvent(step, count))
    epsilon, order = accountant.get_epsilon_and_optimal_order(float(delta))
    return float(epsilon), float(order)


def round_epsilon_up(epsilon: float) -> Decimal:
    """Return `epsilon` with 4 decimals, never less than it was."""
    return Decimal(epsilon).quantize(_EPSILON_STEP, rounding=ROUND_UP)
