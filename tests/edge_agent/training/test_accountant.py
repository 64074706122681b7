import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant

from edge_agent.training.accountant import ORDERS, Phase, compute_epsilon, compute_rdp

GRID = [  # q, z, steps, delta
    (0.064, 1, 160, 1e-5),
    (0.01, 1, 1000, 1e-5),
    (0.1, 2, 100, 1e-5),
    (0.05, 1, 100, 1e-3),
    (0.25, 1, 100, 1e-3),
    (1, 1, 1, 1e-3),
    (1, 50, 10, 1e-5),
    (0.05, 100, 3, 1e-6),
    (0.9, 30, 1000, 1e-3),
    (1e-3, 0.7, 10_000, 1e-6),
    (0.05, 1, 1, 1e-3),
    (0.2, 0.1, 1, 1e-3),
]


def opacus_epsilon(history, delta):
    accountant = RDPAccountant()
    accountant.history = [(z, q, steps) for q, z, steps in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest
        return accountant.get_epsilon(delta, alphas=list(ORDERS))


def dp_accounting_epsilon(history, delta):
    accountant = RdpAccountant()
    for q, z, steps in history:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(("q", "z", "steps", "delta"), GRID)
def test_epsilon_is_within_one_percent_of_both_reference_accountants(q, z, steps, delta):
    epsilon = compute_epsilon([Phase(q, z, steps)], delta)
    assert epsilon == pytest.approx(opacus_epsilon([(q, z, steps)], delta), rel=1e-2)
    assert epsilon == pytest.approx(dp_accounting_epsilon([(q, z, steps)], delta), rel=1e-2)


# The last: where the best order is below 2, dp-accounting only bounds fractional orders, here 3 % above.
@pytest.mark.parametrize(("q", "z", "steps", "delta"), [*GRID, (0.5, 0.5, 10, 1e-3)])
def test_plan_calibrated_with_dp_accounting_is_never_found_dearer_on_the_device(q, z, steps, delta):
    assert compute_epsilon([Phase(q, z, steps)], delta) <= dp_accounting_epsilon([(q, z, steps)], delta) * (1 + 1e-9)


@pytest.mark.parametrize(("q", "z", "epsilon"), [(0.064, 1, 6.241), (0.01, 1, 2.101), (0.1, 2, 2.581)])
def test_published_values(q, z, epsilon):
    steps = {0.064: 160, 0.01: 1000, 0.1: 100}[q]
    assert compute_epsilon([Phase(q, z, steps)], 1e-5) == pytest.approx(epsilon, abs=1e-3)


def test_phases_of_different_kinds_compose():
    history = [(0.05, 1.0, 100), (0.2, 2.0, 30), (1.0, 20.0, 5), (0.05, 1.0, 50)]
    epsilon = compute_epsilon([Phase(*phase) for phase in history], 1e-5)
    assert epsilon == pytest.approx(opacus_epsilon(history, 1e-5), rel=1e-6)
    assert epsilon < sum(compute_epsilon([Phase(*phase)], 1e-5) for phase in history)


def test_plain_gaussian_has_its_closed_form():
    np.testing.assert_allclose(compute_rdp(1.0, 3.0), np.asarray(ORDERS) / 18)


@pytest.mark.parametrize(("q", "z"), [(0.01, 0.5), (0.2, 1.0), (0.5, 4.0), (0.05, 100.0), (0.99, 0.3)])
def test_quadrature_of_fractional_orders_meets_the_exact_sum_between_integer_orders(q, z):
    """log A is convex in the order: a fractional value lies below the chord of its integer neighbours."""
    log_moments = dict(zip(ORDERS, compute_rdp(q, z) * (np.asarray(ORDERS) - 1), strict=True))
    for low in range(2, 10):
        for tenth in range(1, 10):
            chord = (log_moments[low] * (10 - tenth) + log_moments[low + 1] * tenth) / 10
            value = log_moments[1 + ((low - 1) * 10 + tenth) / 10]
            assert log_moments[low] <= value <= chord * (1 + 1e-9) + 1e-12


def test_no_noise_is_no_privacy_unless_nothing_was_done():
    assert compute_epsilon([Phase(0.1, 0, 1)], 1e-3) == math.inf
    assert compute_epsilon([Phase(0.1, 1, 10), Phase(0.1, 0, 1)], 1e-3) == math.inf
    assert compute_epsilon([Phase(0.1, 0, 0)], 1e-3) == 0
    assert compute_epsilon([], 1e-3) == 0


@settings(deadline=None)  # a new q and z costs milliseconds
@given(
    q=st.floats(1e-4, 1),
    z=st.floats(0.01, 100),
    steps=st.integers(1, 10_000),
    delta=st.floats(1e-9, 0.1),
)
def test_more_steps_never_cost_less_and_subsampling_never_costs_more(q, z, steps, delta):
    epsilon = compute_epsilon([Phase(q, z, steps)], delta)
    assert 0 <= epsilon < math.inf
    assert epsilon <= compute_epsilon([Phase(q, z, steps + 1)], delta)
    assert epsilon <= compute_epsilon([Phase(1, z, steps)], delta)


@pytest.mark.parametrize(("q", "z", "steps"), [(0, 1, 1), (1.1, 1, 1), (0.5, -1, 1), (0.5, math.nan, 1), (0.5, 1, -1)])
def test_impossible_phases_are_refused(q, z, steps):
    with pytest.raises(ValueError, match="must be"):
        Phase(q, z, steps)
