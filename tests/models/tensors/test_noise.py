import math
import os
import time
from decimal import Decimal

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from models.tensors import noise
from models.tensors.noise import (
    GRID_SLACK,
    Keystream,
    add_on_grid,
    build_grid,
    draw_gaussian,
    draw_normal,
    draw_poisson,
)

COUNT = 1_000_000
SIGMAS = 6  # of a normal: each check below raises a false alarm once in 5e8 runs


def variance_is(values, expected):
    """The sample variance of n normals has relative standard deviation sqrt(2 / n) (chi-square)."""
    return abs(np.mean(values**2) / expected - 1) < SIGMAS * np.sqrt(2 / values.size)


def test_noise_has_the_mean_and_variance_asked_for():
    values = draw_gaussian(COUNT, 3.0)
    assert values.dtype == np.float64
    assert values.shape == (COUNT,)
    assert abs(values.mean()) < SIGMAS * 3 / np.sqrt(COUNT)
    assert variance_is(values, 9.0)


@pytest.mark.parametrize("factor", [0.25, 0.99, 1.01])
def test_check_of_the_variance_sees_one_percent(factor):
    assert not variance_is(draw_gaussian(COUNT, 3.0 * factor), 9.0)


def test_noise_is_normal_in_its_body_and_its_tails():
    values = np.abs(draw_gaussian(COUNT, 1.0))
    for bound, inside in ((0.5, 0.3829249), (1, 0.6826895), (2, 0.9544997), (3, 0.9973002), (4, 0.9999367)):
        deviation = np.sqrt(inside * (1 - inside) / COUNT)
        assert abs((values < bound).mean() - inside) < SIGMAS * deviation, bound


def test_values_of_one_draw_are_uncorrelated_at_every_lag_that_the_construction_could_couple():
    values = draw_gaussian(1 << 18, 1.0)
    for lag in (1, 2, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16):
        for power in (1, 2):  # the squares show a radius that two values share wrongly
            a, b = values[lag:] ** power, values[:-lag] ** power
            assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / np.sqrt(a.size), (lag, power)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16_383, 16_384, 16_385])
def test_any_count_of_values_is_drawn(count):
    values = draw_gaussian(count, 1.0)
    assert values.shape == (count,)
    assert np.unique(values).size == count


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_extreme_keys_give_finite_noise(byte):
    assert np.isfinite(draw_gaussian(10, 1.0, lambda size: byte * size)).all()


def test_same_entropy_gives_the_same_noise_and_the_systems_never_does():
    seeded = [draw_gaussian(100, 1.0, np.random.default_rng(7).bytes) for _ in range(2)]
    np.testing.assert_array_equal(*seeded)
    assert not np.intersect1d(draw_gaussian(100, 1.0), draw_gaussian(100, 1.0)).size


@pytest.mark.parametrize(("count", "clipping_norm"), [(1, 1.0), (4, 0.3), (101_770, 1.5), (10**8, 1e-3)])
def test_rounding_to_the_grid_moves_two_sums_apart_by_a_thousandth_of_the_clipping_norm_at_most(count, clipping_norm):
    grid = build_grid(count, clipping_norm)
    assert math.frexp(grid)[0] == 0.5  # a power of two
    assert 0.5 < grid * math.sqrt(count) / (GRID_SLACK * clipping_norm) <= 1


def test_noised_sum_lies_on_the_grid_whatever_the_sum_was():
    """So its last bits tell nothing: a sum of floats would land where only one of two neighbours can."""
    grid = build_grid(1000, 1.0)
    sums = np.random.default_rng(1).normal(0, 30, (2, 1000))
    for total in sums:
        noise = draw_gaussian(1000, 1.0)
        expected = total + noise
        add_on_grid(total, noise, grid)
        np.testing.assert_array_equal(total / grid, np.rint(total / grid))
        assert np.abs(total - expected).max() <= grid * (1 + 1e-9)


def test_noise_of_the_grid_is_the_noise_rounded_and_no_other():
    grid, noise = build_grid(1000, 1.0), draw_gaussian(1000, 1.0)
    total, shift = np.zeros(1000), 12345 * grid
    shifted = np.full(1000, shift)
    add_on_grid(total, noise.copy(), grid)
    add_on_grid(shifted, noise.copy(), grid)
    np.testing.assert_array_equal(shifted, total + shift)


def test_key_of_every_call_is_new_and_of_full_length():
    asked = []

    def entropy(size):
        asked.append(size)
        return np.random.default_rng(len(asked)).bytes(size)

    first, second = (draw_gaussian(1000, 1.0, entropy) for _ in range(2))
    assert asked == [32, 16, 32, 16]
    assert not np.intersect1d(first, second).size


def test_keystream_is_aes_in_counter_mode():
    key, counter = bytes(range(32)), bytes(16)
    given = iter([key, counter])
    keystream = Keystream(lambda _size: next(given))
    assert keystream(32) + keystream(16) == Cipher(AES(key), CTR(counter)).encryptor().update(bytes(48))


@pytest.mark.parametrize("spares_one_in", [noise._SPARE_ONE_IN, 1 << 30])
def test_one_draw_is_normal_in_every_bin_the_layers_wedges_and_the_tails_included(monkeypatch, spares_one_in):
    """Chi-square over 202 bins: beyond mean + 7 sigma less than once in 1e8 runs; with enough spare draws, and with few."""
    monkeypatch.setattr(noise, "_SPARE_ONE_IN", spares_one_in)
    count = 4_000_000
    edges = np.concatenate([[-np.inf], np.arange(-4, 4.01, 0.04), [np.inf]])
    expected = count * np.diff([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])

    def statistic(values):
        return float(((np.histogram(values, edges)[0] - expected) ** 2 / expected).sum())

    bound = expected.size + 7 * math.sqrt(2 * expected.size)
    values = draw_normal(count, Keystream(os.urandom))
    assert statistic(values) < bound
    in_a_tail = np.abs(values) > 3.66  # beyond the ziggurat's lowest box
    share = math.erfc(3.66 / math.sqrt(2))
    assert abs(in_a_tail.sum() - count * share) < SIGMAS * math.sqrt(count * share)
    assert statistic(np.where(in_a_tail, values / 2, values)) > bound  # so it can tell a missing tail


def test_no_noise_is_exactly_zero():
    np.testing.assert_array_equal(draw_gaussian(10, 0.0), np.zeros(10))


def test_a_million_values_take_less_than_half_a_second_of_processor_time():
    started = time.process_time()
    draw_gaussian(COUNT, 1.0)
    assert time.process_time() - started < 0.5  # 0.04 s measured


def test_poisson_draws_vary_as_independent_coins_do():
    counts = np.array([draw_poisson(1000, Decimal("0.2")).sum() for _ in range(4000)])
    assert abs(counts.mean() - 200) < SIGMAS * np.sqrt(160 / 4000)
    assert abs(counts.var() / 160 - 1) < SIGMAS * np.sqrt(2 / 4000)  # a fixed or shuffled batch has variance 0


def test_every_sample_has_the_same_chance():
    shares = np.mean([draw_poisson(50, Decimal("0.3")) for _ in range(20_000)], axis=0)
    assert np.abs(shares - 0.3).max() < SIGMAS * np.sqrt(0.21 / 20_000)


def test_rate_of_one_takes_everybody_and_the_least_entropy_takes_part_at_any_rate():
    assert draw_poisson(1000, Decimal(1)).all()
    assert draw_poisson(1000, Decimal(1), lambda size: b"\xff" * size).all()
    assert draw_poisson(3, Decimal("1e-9"), lambda size: b"\x00" * size).all()
    assert draw_poisson(0, Decimal("0.5")).shape == (0,)


def test_rate_is_never_rounded_up():
    rate = Decimal("0.1")
    first_left_out = int(rate * 2**53)
    for integer, expected in ((first_left_out - 1, True), (first_left_out, False)):
        data = (integer << 11).to_bytes(8, "little")
        assert draw_poisson(1, rate, lambda _size, data=data: data)[0] == expected
