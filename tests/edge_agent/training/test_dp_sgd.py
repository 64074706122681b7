from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_agent.training.dp_sgd import local_training
from models.tensors.noise import GRID_SLACK, draw_gaussian, draw_poisson
from tests.simulators.step_graph import build_privacy, build_training, clipped_sum_in_numpy, open_onnx_step

EVERYONE_WITHOUT_NOISE = build_privacy(noise_multiplier="0", sampling_rate="1")
ONE_STEP = build_training(steps=1)
PARAMETERS = np.array([0.5, -1.0, 2.0, 0.1], np.float32)
GRID = 2e-5  # what rounding to the noise's grid may do to an update of a few steps


STEP, _ = open_onnx_step()


def draw_samples(count, seed=0):
    generator = np.random.default_rng(seed)
    return (
        generator.normal(0, 2, (count, 3)).astype(np.float32),
        generator.normal(0, 2, count).astype(np.float32),
    )


def train(x, y, privacy, training, *, step=STEP, parameters=PARAMETERS, noise=draw_gaussian, sampler=draw_poisson):
    return local_training(step, x, y, parameters, privacy, training, noise, sampler)


@pytest.mark.parametrize("momentum", ["0", "0.9"])
def test_without_noise_and_sampling_it_is_clipped_gradient_descent(momentum):
    x, y = draw_samples(37)  # more than four batches: none is cut short
    training = build_training(steps=5, expected_batch="20", momentum=momentum)
    current, velocity = PARAMETERS.astype(np.float64), np.zeros(4)
    for _ in range(5):
        velocity = float(momentum) * velocity + clipped_sum_in_numpy(x, y, 1, current) / 20
        current = current - 0.1 * velocity
    update = train(x, y, EVERYONE_WITHOUT_NOISE, training)
    assert update.dtype == np.float32
    np.testing.assert_allclose(update, current - PARAMETERS, atol=GRID)
    np.testing.assert_array_equal(update, train(x, y, EVERYONE_WITHOUT_NOISE, training))  # momentum begins anew


def test_proximal_term_pulls_towards_the_start_of_the_round():
    x, y = draw_samples(37)
    training = build_training(steps=6, expected_batch="20", proximal_mu="2.5")
    current = PARAMETERS.astype(np.float64)
    for _ in range(6):
        gradient = clipped_sum_in_numpy(x, y, 1, current) / 20 + 2.5 * (current - PARAMETERS)
        current = current - 0.1 * gradient
    update = train(x, y, EVERYONE_WITHOUT_NOISE, training)
    np.testing.assert_allclose(update, current - PARAMETERS, atol=GRID)
    free = train(x, y, EVERYONE_WITHOUT_NOISE, build_training(steps=6, expected_batch="20"))
    assert np.linalg.norm(update) < np.linalg.norm(free)


def test_local_parameters_are_inside_the_clipped_norm_and_take_the_same_noise():
    step, _ = open_onnx_step(local=True)
    x, y = np.zeros((1, 3), np.float32), np.full(1, 1e3, np.float32)  # whose gradient is the local bias's alone
    moved = train(x, y, EVERYONE_WITHOUT_NOISE, build_training(steps=1, expected_batch="1"), step=step)
    assert list(step.is_local) == [False] * 3 + [True]
    np.testing.assert_allclose(moved, [0, 0, 0, 0.1], atol=GRID)  # the clipping norm, times the learning rate
    scales = []

    def noise(count, standard_deviation):
        scales.append((count, standard_deviation))
        return np.full(count, standard_deviation)

    moved = train(x[:0], y[:0], build_privacy(), build_training(steps=1, expected_batch="1"), step=step, noise=noise)
    assert [count for count, _ in scales] == [4]
    np.testing.assert_allclose(moved, np.full(4, -0.1 * scales[0][1]), rtol=1e-4)


def test_adam_sees_the_noised_mean():
    x, y = draw_samples(37)
    training = build_training(steps=1, optimizer="adam")
    update = train(x, y, EVERYONE_WITHOUT_NOISE, training, noise=lambda count, _std: np.full(count, 1e3))
    np.testing.assert_allclose(update, -0.1, rtol=1e-5)  # its first step is as long as the learning rate


def test_parameters_are_not_modified():
    x, y = draw_samples(5)
    parameters = PARAMETERS.copy()
    train(x, y, build_privacy(), build_training(), parameters=parameters)
    np.testing.assert_array_equal(parameters, PARAMETERS)


def test_denominator_is_the_expected_batch_and_never_the_number_of_samples():
    x, y = draw_samples(6)
    once = train(x, y, EVERYONE_WITHOUT_NOISE, ONE_STEP)
    twice = train(np.tile(x, (2, 1)), np.tile(y, 2), EVERYONE_WITHOUT_NOISE, ONE_STEP)
    np.testing.assert_allclose(twice, 2 * once, atol=GRID)
    doubled = train(x, y, EVERYONE_WITHOUT_NOISE, build_training(steps=1, expected_batch="20"))
    np.testing.assert_allclose(doubled, once / 2, atol=GRID)


def test_each_step_uses_exactly_the_samples_drawn_for_it():
    x, y = draw_samples(20)
    draws = iter([np.arange(20) < 3, np.arange(20) >= 15])
    update = train(
        x, y, build_privacy(noise_multiplier="0"), build_training(steps=2), sampler=lambda _count, _rate: next(draws)
    )
    first = -0.01 * clipped_sum_in_numpy(x[:3], y[:3], 1, PARAMETERS)
    second = -0.01 * clipped_sum_in_numpy(x[15:], y[15:], 1, PARAMETERS + first)
    np.testing.assert_allclose(update, first + second, atol=GRID)


NOISY, _ = open_onnx_step(features=9999, batch=1)


def noise_of_a_round(*, sampler=draw_poisson, noise=draw_gaussian, samples=0):
    """Return (sum + noise) of one step at clipping norm 2 and noise multiplier 3, in clipping norms."""
    update = train(
        np.zeros((samples, 9999), np.float32),
        np.zeros(samples, np.float32),
        build_privacy(clipping_norm="2", noise_multiplier="3", sampling_rate="0.5"),
        build_training(steps=1, expected_batch="1", learning_rate="1"),
        step=NOISY,
        parameters=np.zeros(10_000, np.float32),
        sampler=sampler,
        noise=noise,
    )
    return update / 2


def has_variance_of_nine(values):
    """Six standard deviations of the sample variance of 10 000 normals: wrong once in 5e8 runs."""
    return abs(values.var() / 9 - 1) < 6 * np.sqrt(2 / 10_000)


def test_noise_on_the_sum_is_noise_multiplier_times_clipping_norm():
    assert has_variance_of_nine(noise_of_a_round())


def test_empty_draw_is_noised_like_any_other():
    assert has_variance_of_nine(noise_of_a_round(samples=4, sampler=lambda count, _rate: np.zeros(count, bool)))


def test_a_quarter_of_the_noise_would_be_noticed():
    assert not has_variance_of_nine(noise_of_a_round(noise=lambda count, std: draw_gaussian(count, std / 4)))


def test_no_two_rounds_share_their_noise():
    assert not np.array_equal(noise_of_a_round(), noise_of_a_round())
    seeded = [
        noise_of_a_round(noise=lambda count, std: draw_gaussian(count, std, np.random.default_rng(1).bytes))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*seeded)  # so the comparison above can tell


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=200, deadline=None)
@given(
    x=arrays(np.float32, (3,), elements=numbers),
    y=numbers,
    others_x=arrays(np.float32, (3,), elements=numbers),
    others_y=numbers,
)
def test_one_sample_moves_a_step_by_no_more_than_its_share(x, y, others_x, others_y):
    kept_x, kept_y = draw_samples(10)
    updates = []
    for extra_x, extra_y in (([], []), ([x], [y]), ([others_x], [others_y])):
        rows = np.concatenate([kept_x, np.array(extra_x, np.float32).reshape(-1, 3)])
        targets = np.concatenate([kept_y, np.array(extra_y, np.float32)])
        updates.append(train(rows, targets, EVERYONE_WITHOUT_NOISE, ONE_STEP).astype(np.float64))
    without, with_it, replaced = updates
    share = 0.1 * 1 / 10  # learning rate, clipping norm, expected batch
    assert np.linalg.norm(with_it - without) <= share * (1 + 1e-4 + GRID_SLACK)
    assert np.linalg.norm(replaced - with_it) <= 2 * share * (1 + 1e-4 + GRID_SLACK)


def test_sampling_rate_reaches_the_sampler_exactly():
    x, y = draw_samples(3)
    asked = []

    def sampler(count, rate):
        asked.append((count, rate))
        return np.zeros(count, bool)

    train(x, y, build_privacy(sampling_rate="0.064"), build_training(steps=2), sampler=sampler)
    assert asked == [(3, Decimal("0.064"))] * 2
