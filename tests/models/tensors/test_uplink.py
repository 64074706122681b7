import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tensors.norms import l2_norm
from models.tensors.uplink import STRETCH_MAX, decode_update, encode_update

CHUNK = 256


def send(update: np.ndarray, uplink: str, seed: int = 0) -> np.ndarray:
    data = encode_update(update, uplink, np.random.default_rng(seed))
    return decode_update(data, uplink, size=update.size)


@st.composite
def draw_update(draw):
    """Return updates whose chunks differ in scale: dense, sparse, zero, tiny and huge."""
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 70_000]))
    update = generator.standard_normal(size) * (generator.random(size) < draw(st.sampled_from([0.01, 0.5, 1])))
    return (update * 10.0 ** draw(st.sampled_from([-44, -30, 0, 6, 30]))).astype(np.float32)


def test_float32_arrives_as_it_was_sent():
    update = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    assert send(update, "float32").tobytes() == update.tobytes()


@pytest.mark.parametrize("size", [1000, 100_000])
def test_int8_takes_little_more_than_a_quarter_of_the_bytes(size):
    update = np.ones(size, np.float32)
    sizes = {name: len(encode_update(update, name, np.random.default_rng(0))) for name in ("float32", "int8")}
    assert sizes["int8"] <= 0.27 * sizes["float32"]


@given(draw_update(), st.integers(0, 100))
def test_every_value_is_rounded_to_a_neighbour_and_no_update_grows_beyond_the_bound(update, seed):
    arrived = send(update, "int8", seed)
    assert arrived.dtype == np.float32
    assert arrived.shape == update.shape
    scale = np.repeat([np.abs(chunk).max() for chunk in np.split(update, range(CHUNK, update.size, CHUNK))], CHUNK)
    allowed = scale[: update.size].astype(np.float64) / 127 * (1 + 1e-6) + 2e-45
    assert (np.abs(arrived.astype(np.float64) - update) <= allowed).all()
    assert (arrived[update == 0] == 0).all()
    assert l2_norm(arrived) <= STRETCH_MAX * l2_norm(update) + 2e-45 * update.size


def test_rounding_is_right_on_average_for_every_fraction_and_sign():
    alarm, fractions, times = 1e-6, (0.1, 0.3, 0.5, 0.8), 300
    for seed, (fraction, sign) in enumerate((fraction, sign) for fraction in fractions for sign in (-1, 1)):
        values = sign * (np.arange(CHUNK - 1) % 100 + fraction)
        update = np.append(values, 127).astype(np.float32)  # the scale is 1
        generator = np.random.default_rng(seed)
        total = 0.0
        for _ in range(times):
            arrived = decode_update(encode_update(update, "int8", generator), "int8", size=CHUNK)
            assert set(np.unique(np.round(arrived - np.floor(update)))) <= {0, 1}
            total += float((arrived.astype(np.float64) - update)[:-1].sum())
        # Hoeffding: errors are independent, each in an interval of length 1; one alarm for all eight sums.
        count = times * (CHUNK - 1)
        assert abs(total) <= math.sqrt(count / 2 * math.log(2 * 8 / alarm)), (fraction, sign)


def test_each_update_is_rounded_by_draws_of_its_own():
    update = np.full(CHUNK, 0.5, np.float32)
    update[0] = 127
    generator = np.random.default_rng(0)
    sent = [encode_update(update, "int8", generator) for _ in range(2)]
    assert sent[0] != sent[1]


GOOD = encode_update(np.linspace(-1, 1, 300, dtype=np.float32), "int8", np.random.default_rng(0))


@pytest.mark.parametrize("length", [0, 1, len(GOOD) - 1, len(GOOD) + 1, 1200])
def test_int8_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} bytes, expected 308: 2 scales of float32 and 300 values of int8"):
        decode_update((GOOD * 4)[:length], "int8", size=300)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -1e-45])
def test_scale_that_is_negative_or_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="scale that is negative, NaN or infinite"):
        decode_update(GOOD[:4] + np.float32(scale).tobytes() + GOOD[8:], "int8", size=300)
