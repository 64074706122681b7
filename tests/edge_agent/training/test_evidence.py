"""The privacy claim of the sample unit holds against everything that would refute it, and each breach is refuted."""

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusAccountant

from edge_agent.training.accountant import Phase, compute_epsilon
from tests.simulators import evidence, sabotage

GRID = [(0.064, 1.0, 160), (0.01, 1.0, 1000), (0.1, 2.0, 100)]  # rate, noise multiplier, steps; at delta 1e-5
EPSILONS = [1, 4, 8]


def compute_opacus_epsilon(rate, noise, steps, delta, accountant=OpacusAccountant):
    counted = accountant()
    counted.history = [(noise, rate, steps)]
    return counted.get_epsilon(delta)


def compute_google_epsilon(rate, noise, steps, delta, accountant=RdpAccountant):
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return accountant().compose(step, steps).get_epsilon(delta)


def check_accountant(compute):
    """As large as both RDP accountants to a percent, never below the exact ones, and not a fifth above."""
    for rate, noise, steps in GRID:
        found = compute(rate, noise, steps, 1e-5)
        for other in (compute_opacus_epsilon, compute_google_epsilon):
            assert found == pytest.approx(other(rate, noise, steps, 1e-5), rel=0.01)
        tight = compute_google_epsilon(rate, noise, steps, 1e-5, PLDAccountant)
        assert tight == pytest.approx(compute_opacus_epsilon(rate, noise, steps, 1e-5, PRVAccountant), rel=0.01)
        assert tight <= found <= 1.2 * tight


def compute_own_epsilon(rate, noise, steps, delta):
    return compute_epsilon([Phase(rate, noise, steps)], delta)


def check_budget(directory, engine="onnx"):
    evidence.check_budget_survives_restarts(directory, engine, compute_opacus_epsilon)


CHECKS = [
    evidence.check_noise,
    evidence.check_sensitivity_of_one_sample,
    evidence.check_sampler_is_poisson,
    check_budget,
]
BREACHES = [
    (sabotage.quarter_the_noise, evidence.check_noise),
    (sabotage.reuse_the_seed, evidence.check_noise),
    (sabotage.clip_at_five_times_the_norm, evidence.check_sensitivity_of_one_sample),
    (sabotage.shuffle, evidence.check_sampler_is_poisson),
    (sabotage.draw_batches_of_a_fixed_size, evidence.check_sampler_is_poisson),
    (sabotage.reset_the_ledger, check_budget),
]


@pytest.fixture(scope="module")
def canary_step(tmp_path_factory):
    return evidence.build_canary_step(tmp_path_factory.mktemp("canaries") / "architecture")


@pytest.mark.parametrize("engine", ["onnx", "opacus"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_evidence_does_not_refute_the_claim(tmp_path, check, engine):
    check(tmp_path, engine)


@pytest.mark.parametrize(("breach", "check"), BREACHES, ids=lambda value: value.__name__)
def test_evidence_refutes_a_breach(tmp_path, monkeypatch, breach, check):
    breach(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path)


def test_evidence_refutes_opacus_that_clips_too_late(tmp_path, monkeypatch):
    sabotage.clip_at_five_times_the_norm(monkeypatch)
    with pytest.raises(AssertionError, match="one sample counts for"):
        evidence.check_sensitivity_of_one_sample(tmp_path, "opacus")


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_canaries_of_one_run_tell_no_more_than_epsilon_allows(tmp_path, canary_step, epsilon):
    scores, is_in = evidence.score_canaries(tmp_path, canary_step, epsilon)
    evidence.check_audit(scores, is_in, epsilon)
    evidence.check_score_gap(scores, is_in, epsilon)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(
    "breach",
    [sabotage.quarter_the_noise, sabotage.clip_at_five_times_the_norm, sabotage.reuse_the_seed],
    ids=lambda breach: breach.__name__,
)
def test_canaries_of_one_run_show_a_breach(tmp_path, monkeypatch, canary_step, breach, epsilon):
    breach(monkeypatch)
    scores, is_in = evidence.score_canaries(tmp_path, canary_step, epsilon)
    with pytest.raises(AssertionError, match="guesses are right"):
        evidence.check_audit(scores, is_in, epsilon)
    with pytest.raises(AssertionError, match="stand out by"):
        evidence.check_score_gap(scores, is_in, epsilon)


def test_epsilon_is_that_of_four_other_accountants():
    check_accountant(compute_own_epsilon)


@pytest.mark.parametrize("change", [{"rate": 0.5}, {"noise": 1.25}, {"steps": 0.75}], ids=["rate", "noise", "steps"])
def test_accountant_that_counts_too_little_is_refuted(change):
    def compute(rate, noise, steps, delta):
        changed = (change.get("rate", 1) * rate, change.get("noise", 1) * noise, int(change.get("steps", 1) * steps))
        return compute_own_epsilon(*changed, delta)

    with pytest.raises(AssertionError):
        check_accountant(compute)
