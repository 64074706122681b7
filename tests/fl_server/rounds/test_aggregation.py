import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fl_server.rounds.aggregation import SumFold, check_update, move

GOOD = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        (b"", "0 bytes, expected 16"),
        (GOOD.tobytes()[:-1], "15 bytes"),
        (GOOD[:1].tobytes(), "4 bytes"),
        (GOOD.tobytes() + bytes(4), "20 bytes"),
        (GOOD.astype(np.float64).tobytes(), "32 bytes"),
        (np.array([1, np.nan, 1, 1], np.float32).tobytes(), "NaN"),
        (np.array([1, -np.inf, 1, 1], np.float32).tobytes(), "infinity"),
        (np.full(4, 1e30, np.float32).tobytes(), "norm"),
        ((GOOD * 2).tobytes(), "norm"),
    ],
)
def test_update_that_is_not_one_small_finite_vector_is_refused_with_its_reason(received, reason):
    outcome = check_update(received, size=4, norm_limit=3.9)
    assert isinstance(outcome, str)
    assert reason in outcome


@pytest.mark.parametrize(
    ("scale", "code", "reason"),
    [(np.nan, 1, "scale"), (np.inf, 1, "scale"), (-1, 1, "scale"), (3e38, 127, "infinity"), (2, 1, "norm")],
)
def test_update_in_int8_is_refused_for_its_scale_and_for_what_it_decodes_to(scale, code, reason):
    received = np.float32(scale).tobytes() + np.full(4, code, np.int8).tobytes()
    outcome = check_update(received, size=4, norm_limit=3.9, uplink="int8")
    assert isinstance(outcome, str)
    assert reason in outcome


def test_update_in_int8_counts_as_what_it_decodes_to():
    received = np.float32(0.5).tobytes() + np.array([2, -2, 0, -3], np.int8).tobytes()
    outcome = check_update(received, size=4, norm_limit=3.9, uplink="int8")
    np.testing.assert_array_equal(outcome, np.array([1, -1, 0, -1.5], np.float32))


@pytest.mark.parametrize("update", [GOOD, -GOOD, np.zeros(4, np.float32)])
def test_update_within_the_norm_limit_counts_as_it_is(update):
    outcome = check_update(update.astype("<f4").tobytes(), size=4, norm_limit=2.0)
    assert not isinstance(outcome, str)
    np.testing.assert_array_equal(outcome, update)


def test_reason_for_refusal_does_not_tell_the_norm():
    outcome = check_update((GOOD * np.float32(123.456)).tobytes(), size=4, norm_limit=1.0)
    assert isinstance(outcome, str)
    assert "246" not in outcome


@given(st.lists(arrays(np.float32, 3, elements=st.floats(-100, 100, width=32)), min_size=1, max_size=20))
def test_fold_is_the_mean_with_equal_weights_in_any_order(updates):
    start = np.array([1, 2, 3], np.float32)
    folds = [SumFold(3), SumFold(3)]
    for fold, order in zip(folds, [updates, updates[::-1]], strict=True):
        for update in order:
            fold.add(update)
    expected = start + np.mean(np.array(updates, np.float64), axis=0)
    for fold in folds:
        moved = move(start, fold.finish(fold.count))
        assert moved.dtype == np.float32
        np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-6)


def test_fold_of_many_small_updates_keeps_what_float32_would_lose():
    fold = SumFold(1)
    fold.add(np.array([1e8], np.float32))
    for _ in range(999):
        fold.add(np.array([1], np.float32))
    assert move(np.zeros(1, np.float32), fold.finish(1000))[0] == np.float32((1e8 + 999) / 1000)


def test_step_of_zeros_leaves_parameters_bit_identical():
    start = np.array([0.1, -2.5, np.finfo(np.float32).tiny], np.float32)
    assert move(start, np.zeros(3)).tobytes() == start.tobytes()
