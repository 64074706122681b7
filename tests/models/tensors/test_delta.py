"""A delta leads from one version's weights to the next one's and nowhere else, whatever it claims to be."""

import io

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from models.tensors.delta import apply_delta, build_delta

BLOCK = 1000
BASE = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)
NEXT = BASE + np.random.default_rng(1).integers(-2, 3, BASE.size).astype(np.uint8)
DELTA = build_delta(BASE.tobytes(), NEXT.tobytes())


def apply(base: bytes, delta: bytes, *, size: int, block: int = BLOCK) -> bytes:
    return b"".join(apply_delta(io.BytesIO(base), delta, size_bytes=size, block_bytes=block))


@given(pair=st.integers(1, 70).flatmap(lambda size: st.tuples(*[st.binary(min_size=size, max_size=size)] * 2)))
def test_delta_of_any_two_of_one_length_leads_from_one_to_the_other(pair):
    base, result = pair
    for block in (1, 7, 64, 1000):
        assert apply(base, build_delta(base, result), size=len(result), block=block) == result


def test_weights_a_few_steps_apart_take_a_fraction_of_their_bytes():
    assert apply(BASE.tobytes(), DELTA, size=BASE.size) == NEXT.tobytes()
    assert len(DELTA) < 0.35 * BASE.size, "five steps as likely as each other are 2.3 of 8 bits"


@pytest.mark.parametrize(
    ("base", "delta"),
    [
        (BASE.tobytes(), b""),
        (BASE.tobytes(), b"no delta"),
        (BASE.tobytes(), DELTA[: len(DELTA) // 2]),
        (BASE.tobytes(), DELTA[:20] + bytes(20) + DELTA[40:]),
        (BASE[:-1].tobytes(), DELTA),
        (BASE.tobytes(), build_delta(BASE[:-1].tobytes(), NEXT[:-1].tobytes())),
        (BASE.tobytes(), build_delta(bytes(BASE.size + 1), bytes(BASE.size + 1))),
    ],
    ids=["nothing", "junk", "cut off", "altered", "short base", "short", "long"],
)
def test_what_does_not_lead_to_the_length_that_was_signed_is_refused(base, delta):
    with pytest.raises(ValueError, match="delta"):
        apply(base, delta, size=BASE.size)


def test_bomb_is_decompressed_no_further_than_the_result_is_long():
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))
    blocks = apply_delta(io.BytesIO(BASE.tobytes()), bomb, size_bytes=BASE.size, block_bytes=BLOCK)
    assert b"".join(next(blocks) for _ in range(BASE.size // BLOCK)) == BASE.tobytes()
    with pytest.raises(ValueError, match="goes on behind the 20000 bytes"):
        next(blocks)


def test_window_that_takes_more_memory_than_a_device_gives_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    greedy = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    delta = greedy.compress(bytes(1 << 20)) + greedy.flush()
    with pytest.raises(ValueError, match="no delta"):
        apply(bytes(1 << 20), delta, size=1 << 20)


def test_no_delta_leads_to_another_length():
    with pytest.raises(ValueError, match="no delta leads from 2 bytes to 3"):
        build_delta(b"ab", b"abc")
