"""Training for the device unit: ordinary steps, and one bound on all that comes of them."""

import warnings
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.training.bounded_sgd import bounded_training
from models.contract.privacy import Unit
from models.tensors.noise import draw_poisson
from models.tensors.norms import l2_norm
from tests.simulators.step_graph import build_privacy, build_training, open_onnx_step

STEP, _ = open_onnx_step()
PARAMETERS = np.array([0.5, -1.0, 2.0, 0.1], np.float32)


def draw_samples(count: int, *, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count)
    with np.errstate(over="ignore"):
        x = (scale * generator.normal(size=(count, 3))).astype(np.float32)
    return x, generator.normal(size=count).astype(np.float32)


def train(x, y, *, clipping_norm: str, sampler=draw_poisson, **training) -> np.ndarray:
    privacy = build_privacy(unit=Unit.DEVICE, clipping_norm=clipping_norm)
    return bounded_training(STEP, x, y, PARAMETERS, privacy, build_training(**training), sampler)


def test_steps_are_those_of_sgd_on_the_mean_gradient():
    x, y = draw_samples(30)
    expected = PARAMETERS.astype(np.float64)
    for _ in range(3):
        residual = x @ expected[:3] + expected[3] - y
        expected = expected - 0.1 * np.append(residual @ x, residual.sum()) / 30
    moved = train(x, y, clipping_norm="1000", steps=3, expected_batch="30")
    np.testing.assert_allclose(moved, expected - PARAMETERS, atol=1e-5)


def test_device_with_fewer_samples_than_a_batch_takes_their_mean_and_one_without_stays_where_it_is():
    x, y = draw_samples(6)
    residual = x @ PARAMETERS[:3] + PARAMETERS[3] - y
    expected = -0.1 * np.append(residual @ x, residual.sum()) / 6
    np.testing.assert_allclose(train(x, y, clipping_norm="1000", steps=1, expected_batch="100"), expected, atol=1e-5)
    np.testing.assert_array_equal(train(x[:0], y[:0], clipping_norm="1", steps=4), np.zeros(4))


def test_batches_are_drawn_at_the_rate_that_the_expected_batch_asks_for():
    asked = []

    def draw(count, rate):
        asked.append((count, rate))
        return np.ones(count, bool)

    train(*draw_samples(40), clipping_norm="1", sampler=draw, steps=2, expected_batch="10")
    assert asked == [(40, Decimal("0.25"))] * 2


@given(
    scale=st.sampled_from([0, 1e-3, 1, 1e3, 1e10, 1e20, 1e38, np.inf, np.nan]),
    learning_rate=st.sampled_from(["0.1", "1000", "1e38"]),
    clipping_norm=st.sampled_from(["0.01", "1", "7.3"]),
    optimizer=st.sampled_from(["sgd", "adam"]),
)
def test_whatever_a_device_holds_its_update_is_finite_and_within_the_clipping_norm(
    scale, learning_rate, clipping_norm, optimizer
):
    moved = train(
        *draw_samples(20, scale=scale),
        clipping_norm=clipping_norm,
        steps=4,
        learning_rate=learning_rate,
        optimizer=optimizer,
    )
    assert moved.dtype == np.float32
    assert l2_norm(moved) <= float(clipping_norm)


def test_training_that_diverges_is_not_told_from_training_that_moves_nothing():
    with warnings.catch_warnings(action="error"):
        moved = train(*draw_samples(20), clipping_norm="1", steps=3, learning_rate="1e38")
    np.testing.assert_array_equal(moved, np.zeros(4))


def test_long_update_is_shortened_and_keeps_its_direction():
    x, y = draw_samples(30)
    long, short = (
        train(x, y, clipping_norm=bound, steps=3, expected_batch="30").astype(np.float64) for bound in ("1000", "0.01")
    )
    assert l2_norm(short.astype(np.float32)) == pytest.approx(0.01, rel=1e-5)
    np.testing.assert_allclose(short / 0.01, long / np.linalg.norm(long), atol=1e-4)


def test_what_leaves_has_the_clipping_norm_for_itself_and_what_is_local_is_bounded_too():
    step, _ = open_onnx_step(local=True)
    x, y = draw_samples(30)
    whole = train(x, y, clipping_norm="1000", steps=3, expected_batch="30")
    privacy, training = (
        build_privacy(unit=Unit.DEVICE, clipping_norm="0.01"),
        build_training(expected_batch="30", steps=3),
    )
    moved = bounded_training(step, x, y, PARAMETERS, privacy, training, draw_poisson)
    np.testing.assert_allclose(moved[:3], 0.01 * whole[:3] / l2_norm(whole[:3]), rtol=1e-4)
    np.testing.assert_allclose(moved[3], np.copysign(0.01, whole[3]), rtol=1e-4)
