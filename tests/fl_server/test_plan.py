from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.plan import compute_norm_limit
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit


def build_plans(*, steps: int, momentum: str, noise_multiplier: str) -> tuple[PrivacyPlan, TrainingPlan]:
    privacy = PrivacyPlan(
        unit=Unit.SAMPLE,
        clipping_norm=Decimal("1.5"),
        noise_multiplier=Decimal(noise_multiplier),
        sampling_rate=Decimal("0.25"),
        delta=Decimal("0.001"),
        epsilon=Decimal(8),
    )
    training = TrainingPlan(
        rounds=3,
        steps=steps,
        expected_batch=Decimal(32),
        learning_rate=Decimal("0.5"),
        momentum=Decimal(momentum),
    )
    return privacy, training


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 20),
    momentum=st.sampled_from(["0", "0.9"]),
    noise_multiplier=st.sampled_from(["0", "0.8", "5"]),
    drawn=st.integers(0, 128),
)
def test_honest_update_stays_below_the_norm_limit(seed, steps, momentum, noise_multiplier, drawn):
    size = 500
    privacy, training = build_plans(steps=steps, momentum=momentum, noise_multiplier=noise_multiplier)
    generator = np.random.default_rng(seed)
    direction = np.eye(1, size)[0]
    moved, velocity = np.zeros(size), np.zeros(size)
    for _ in range(steps):
        noise = generator.normal(size=size) * float(privacy.noise_multiplier * privacy.clipping_norm)
        gradient = (drawn * float(privacy.clipping_norm) * direction + noise) / float(training.expected_batch)
        velocity = float(training.momentum) * velocity + gradient
        moved -= float(training.learning_rate) * velocity
    assert np.linalg.norm(moved) <= compute_norm_limit(privacy, training, size)


def test_norm_limit_catches_an_update_a_hundred_times_too_long():
    privacy, training = build_plans(steps=5, momentum="0", noise_multiplier="1")
    honest = 5 * 0.5 * 1.5
    assert float(compute_norm_limit(privacy, training, 500)) < 100 * honest


@pytest.mark.parametrize("size", [1, 10, 1_000_000])
def test_norm_limit_is_a_finite_decimal(size):
    limit = compute_norm_limit(*build_plans(steps=5, momentum="0.9", noise_multiplier="1"), size)
    assert limit.is_finite()
    assert limit > 0
