import dataclasses
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.training.optimizers import build_optimizer
from fl_server.plan import compute_norm_limit
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.uplink import STRETCH_MAX


def build_plans(
    *, steps: int, noise_multiplier: str, momentum: str = "0", optimizer: str = "sgd", proximal_mu: str = "0"
) -> tuple[PrivacyPlan, TrainingPlan]:
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
        optimizer=optimizer,
        proximal_mu=Decimal(proximal_mu),
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


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 40),
    plan=st.sampled_from([{"optimizer": "adam"}, {"momentum": "0.9"}, {"momentum": "0.5"}, {"momentum": "0"}]),
    proximal_mu=st.sampled_from(["0", "0.1", "2"]),
    is_steady=st.booleans(),
)
def test_honest_update_of_every_optimizer_with_a_proximal_term_stays_below_the_norm_limit(
    seed, steps, plan, proximal_mu, is_steady
):
    size = 200
    privacy, training = build_plans(steps=steps, noise_multiplier="0.8", proximal_mu=proximal_mu, **plan)
    generator = np.random.default_rng(seed)
    optimizer, moved = build_optimizer(training, size), np.zeros(size, np.float32)
    bound = float(privacy.clipping_norm)
    batch, deviation = float(training.expected_batch), bound * float(privacy.noise_multiplier)
    direction = np.full(size, size**-0.5)
    for _ in range(steps):
        sign = 1 if is_steady else generator.choice([-1, 1]) * 10.0 ** -generator.integers(0, 5)
        total = sign * 2 * batch * bound * direction + generator.normal(0, deviation, size)
        total = (total + float(training.proximal_mu) * batch * moved).astype(np.float32)
        optimizer(total)
        moved -= total
    assert np.linalg.norm(moved) <= compute_norm_limit(privacy, training, size)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_norm_limit_leaves_room_for_as_much_as_rounding_to_int8_can_stretch_an_update(optimizer):
    privacy, training = build_plans(steps=5, optimizer=optimizer, noise_multiplier="1")
    limit = compute_norm_limit(privacy, training, 1000)
    rounded = compute_norm_limit(privacy, dataclasses.replace(training, uplink="int8"), 1000)
    assert float(rounded / limit) == pytest.approx(STRETCH_MAX, rel=1e-6)


def test_norm_limit_of_adam_is_what_steady_gradients_reach():
    training = build_plans(steps=30, optimizer="adam", noise_multiplier="0")[1]
    optimizer, moved = build_optimizer(training, 4), np.zeros(4, np.float32)
    for _ in range(30):
        total = np.ones(4, np.float32)
        optimizer(total)
        moved -= total
    limit = float(compute_norm_limit(*build_plans(steps=30, optimizer="adam", noise_multiplier="0"), 4))
    assert np.linalg.norm(moved) <= limit < 2 * np.linalg.norm(moved)


def test_norm_limit_catches_an_update_a_hundred_times_too_long():
    privacy, training = build_plans(steps=5, momentum="0", noise_multiplier="1")
    honest = 5 * 0.5 * 1.5
    assert float(compute_norm_limit(privacy, training, 500)) < 100 * honest


@pytest.mark.parametrize("size", [1, 10, 1_000_000])
def test_norm_limit_is_a_finite_decimal(size):
    limit = compute_norm_limit(*build_plans(steps=5, momentum="0.9", noise_multiplier="1"), size)
    assert limit.is_finite()
    assert limit > 0
