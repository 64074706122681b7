"""Who takes part, how much noise there is, and what following a quantile costs; each false alarm once in a million."""

import os
from decimal import Decimal

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from fl_server.rounds.mechanism import (
    adapt_clipping_norm,
    compute_expected_cohort,
    compute_sum_noise,
    draw_cohort,
    is_uncut,
)
from models.contract.privacy import Unit
from models.tensors.norms import clip_norm, l2_norm
from models.tensors.uplink import decode_update, encode_update
from tests.simulators.step_graph import build_privacy

FALSE_ALARM = 1e-6


def compute_rdp_epsilon(*noise_multipliers: float) -> float:
    """Return what 20 rounds of releases with such noise cost, each of the same tenth of devices."""
    accountant = RdpAccountant()
    together = ComposedDpEvent([GaussianDpEvent(noise) for noise in noise_multipliers])
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(0.1, together), 20))
    return float(accountant.get_epsilon(1e-4))


def test_cohort_is_drawn_device_by_device_and_its_size_with_it() -> None:
    devices, rate, rounds = [f"device-{number}" for number in range(300)], 0.2, 2000
    drawn = np.zeros((rounds, len(devices)), bool)
    place = {name: number for number, name in enumerate(sorted(devices))}
    for number in range(rounds):
        drawn[number, [place[name] for name in draw_cohort(devices, Decimal("0.2"), os.urandom)]] = True
    # A cohort of fixed size has no variance at all; a device that is preferred shows in its count.
    for counts, trials in ((drawn.sum(axis=1), len(devices)), (drawn.sum(axis=0), rounds)):
        found = float((((counts - trials * rate) ** 2) / (trials * rate * (1 - rate))).sum())
        low, high = stats.chi2.ppf([FALSE_ALARM / 4, 1 - FALSE_ALARM / 4], counts.size)
        assert low < found < high


def test_expected_cohort_is_a_constant_of_the_plan() -> None:
    assert compute_expected_cohort(build_privacy(unit=Unit.DEVICE, sampling_rate="0.3"), 10) == pytest.approx(3)


@pytest.mark.parametrize(("noise_multiplier", "expected_cohort"), [("0.6", 20), ("1.1", 100), ("3", 1000)])
def test_sum_and_count_together_cost_what_the_plan_claims(noise_multiplier: str, expected_cohort: float) -> None:
    plan = build_privacy(unit=Unit.DEVICE, noise_multiplier=noise_multiplier)
    of_sum = compute_sum_noise(plan, expected_cohort, is_adaptive=True)
    of_count = expected_cohort / 20 / 0.5  # as measured below, over what one device moves the centred count by
    claimed = compute_rdp_epsilon(float(noise_multiplier))
    assert compute_rdp_epsilon(of_sum, of_count) == pytest.approx(claimed, rel=1e-6)
    assert compute_rdp_epsilon(of_sum) < claimed
    assert compute_sum_noise(plan, expected_cohort, is_adaptive=False) == float(noise_multiplier)


def test_noise_on_the_count_of_cut_updates_is_a_twentieth_of_the_expected_cohort() -> None:
    draws, expected_cohort, uncut, replies = 5000, 200.0, 90, 160
    norms = np.array(
        [
            adapt_clipping_norm(2, uncut, replies, target=0.5, expected_cohort=expected_cohort, entropy=os.urandom)
            for _ in range(draws)
        ]
    )
    shares = 0.5 - np.log(norms / 2) / 0.2
    noise = (shares - 0.5) * expected_cohort - (uncut - replies / 2)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], draws)
    assert low < float(((noise / (expected_cohort / 20)) ** 2).sum()) < high * (1 + 2.0**-9) ** 2


def test_clipping_norm_comes_to_rest_at_the_quantile() -> None:
    lengths = np.random.default_rng(0).lognormal(size=20_000)
    bound = 0.05
    for _ in range(150):
        bound = adapt_clipping_norm(
            bound,
            sum(is_uncut(length, bound) for length in lengths[:500]),
            500,
            target=0.7,
            expected_cohort=500.0,
            entropy=os.urandom,
        )
    assert bound == pytest.approx(np.quantile(lengths[:500], 0.7), rel=0.2)


def test_update_that_was_clipped_counts_as_cut_however_float32_rounded_it() -> None:
    assert not is_uncut(2 * (1 - 2.0**-22), 2)
    assert is_uncut(1.99, 2)


@pytest.mark.parametrize("size", [64, 1000, 10_000])
def test_update_that_was_clipped_counts_as_cut_however_int8_rounded_it(size: int) -> None:
    generator = np.random.default_rng(size)
    for _ in range(200):
        update = clip_norm(generator.normal(size=size).astype(np.float32), 0.5)
        arrived = decode_update(encode_update(update, "int8", generator), "int8", size=size)
        assert not is_uncut(l2_norm(clip_norm(arrived, 0.5)), 0.5, "int8")
    assert is_uncut(0.48, 0.5, "int8")


def test_cohort_too_small_for_its_count_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"needs an expected cohort above 20\.0 devices .* this one is 15"):
        compute_sum_noise(build_privacy(unit=Unit.DEVICE, noise_multiplier="2"), 15, is_adaptive=True)
