"""How much noise keeps a run within its budget, found with dp-accounting's RDP accountant."""

from decimal import ROUND_UP, Decimal
from functools import lru_cache

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

from fl_server.errors import UsageError
from models.contract.privacy import PrivacyPlan, Unit

MARGIN = Decimal("0.995")  # the device's own accountant interpolates orders differently and must not say more
NOISE_STEP = Decimal("0.0001")
NOISE_MAX = Decimal(1000)  # beyond it nothing is learnt from any cohort
_EPSILON_STEP = Decimal("0.0001")


def build_privacy_plan(
    *,
    clipping_norm: Decimal,
    sampling_rate: Decimal,
    delta: Decimal,
    epsilon: Decimal,
    steps: int,
    rounds: int,
) -> PrivacyPlan:
    """Return the plan of unit `sample` whose `rounds` of `steps` steps spend at most `epsilon` at `delta`.

    Raises:
        UsageError: No noise can keep this budget, or a value is out of range.
    """
    try:
        bound = PrivacyPlan(
            unit=Unit.SAMPLE,
            clipping_norm=clipping_norm,
            noise_multiplier=Decimal(0),
            sampling_rate=sampling_rate,
            delta=delta,
            epsilon=epsilon,
        )
    except ValueError as error:
        raise UsageError(f"privacy: {error}") from error
    if steps < 1 or rounds < 1:
        raise UsageError(f"privacy: {rounds} rounds of {steps} steps, both must be >= 1")
    noise_multiplier = calibrate_noise_multiplier(
        sampling_rate=sampling_rate, steps=steps * rounds, delta=delta, epsilon=epsilon
    )
    return PrivacyPlan(
        unit=bound.unit,
        clipping_norm=clipping_norm,
        noise_multiplier=noise_multiplier,
        sampling_rate=sampling_rate,
        delta=delta,
        epsilon=epsilon,
    )


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
    low, high = 0, int(NOISE_MAX / NOISE_STEP)  # in steps of the noise multiplier; low spends too much
    if compute_epsilon(sampling_rate, NOISE_MAX, steps, delta) > target:
        raise UsageError(
            f"epsilon {epsilon} at delta {delta} cannot be kept over {steps} steps with a sampling rate of "
            f"{sampling_rate}, whatever the noise: allow a larger epsilon or delta, or ask for fewer steps"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if compute_epsilon(sampling_rate, middle * NOISE_STEP, steps, delta) <= target:
            high = middle
        else:
            low = middle
    return high * NOISE_STEP


@lru_cache(maxsize=256)
def compute_epsilon(sampling_rate: Decimal, noise_multiplier: Decimal, steps: int, delta: Decimal) -> float:
    """Return what `steps` Poisson-sampled Gaussian steps spend at `delta`, when a record is added or removed."""
    if steps == 0:
        return 0.0
    accountant = RdpAccountant()
    step = PoissonSampledDpEvent(float(sampling_rate), GaussianDpEvent(float(noise_multiplier)))
    accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(float(delta)))


def round_epsilon_up(epsilon: float) -> Decimal:
    """Return `epsilon` with 4 decimals, never less than it was."""
    return Decimal(epsilon).quantize(_EPSILON_STEP, rounding=ROUND_UP)
