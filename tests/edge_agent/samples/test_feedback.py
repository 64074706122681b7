"""The truth meets the request that it belongs to, or is told why not; nothing waits without a bound."""

import itertools

import numpy as np
import pytest

import edge_agent.samples.feedback as feedback_module
from edge_agent.errors import RequestError
from edge_agent.samples.feedback import FeedbackBuffer, parse_target
from models.tensors.spec import TensorSpec

LABEL = TensorSpec("label", ("batch",), "int64")
LABELS = ("low", "middle", "high")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def build(*, max_count: int = 3, ttl_s: float = 10, keep_share: float = 1, draw: float = 0.5) -> FeedbackBuffer:
    return FeedbackBuffer(max_count=max_count, ttl_s=ttl_s, keep_share=keep_share, clock=Clock(), draw=lambda: draw)


def inputs(*rows: float) -> dict[str, np.ndarray]:
    return {"x": np.array([[row] * 2 for row in rows], np.float32)}


def test_truth_and_request_make_one_sample_a_row() -> None:
    buffer = build()
    buffer.remember("a", inputs(1, 2))
    samples = buffer.join("a", ["high", 0], spec=LABEL, labels=LABELS)
    np.testing.assert_array_equal([x for x, _ in samples], [[1, 1], [2, 2]])
    assert [(int(y), y.dtype.name) for _, y in samples] == [(2, "int64"), (0, "int64")]


def test_inputs_are_copied_since_the_request_body_is_not_ours() -> None:
    buffer, given = build(), inputs(1)
    buffer.remember("a", given)
    given["x"][:] = 9
    np.testing.assert_array_equal(buffer.join("a", 0)[0][0], [1, 1])


def test_what_has_no_form_of_a_sample_is_not_remembered() -> None:
    buffer = build()
    buffer.remember("a", {"x": np.zeros((1, 2)), "z": np.zeros((1, 2))})
    buffer.remember("b", {"x": np.array([["text"]], object)})
    assert not buffer._waiting


def test_unknown_id_is_not_found() -> None:
    with pytest.raises(RequestError, match="no request 'a'") as refused:
        build().join("a", 0)
    assert refused.value.status == 404


def test_second_truth_of_a_request_is_refused() -> None:
    buffer = build()
    buffer.remember("a", inputs(1))
    buffer.join("a", 0)
    with pytest.raises(RequestError, match="already") as refused:
        buffer.join("a", 0)
    assert refused.value.status == 410


def test_expired_request_is_gone_with_its_reason() -> None:
    buffer = build(ttl_s=10)
    buffer.remember("a", inputs(1))
    buffer._clock.now_s = 10.0
    with pytest.raises(RequestError, match="older than 10 s") as refused:
        buffer.join("a", 0)
    assert refused.value.status == 410


def test_oldest_gives_way_and_the_memory_of_ids_is_bounded_too() -> None:
    buffer = build(max_count=3)
    for number in range(100):
        buffer.remember(str(number), inputs(number))
    assert len(buffer._waiting) == 3
    assert len(buffer._gone) == 12
    with pytest.raises(RequestError, match="newer requests") as refused:
        buffer.join("96", 0)
    assert refused.value.status == 410
    with pytest.raises(RequestError) as forgotten:
        buffer.join("1", 0)
    assert forgotten.value.status == 404
    assert buffer.join("97", 0)


def test_large_inputs_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_module, "MEMORY_MAX_BYTES", 20)
    buffer = build()
    for name in "abc":
        buffer.remember(name, inputs(1))  # 8 bytes each
    assert buffer._size_bytes == 16
    buffer.remember("d", inputs(*range(10)))
    assert buffer._size_bytes <= 16
    assert buffer.join("d", list(range(10))) == []


def test_share_decides_before_the_truth_is_known_what_is_kept() -> None:
    draws = itertools.cycle([0.1, 0.9])
    buffer = FeedbackBuffer(max_count=9, ttl_s=10, keep_share=0.5, clock=Clock(), draw=lambda: next(draws))
    buffer.remember("a", inputs(1))
    buffer.remember("b", inputs(2))
    assert [len(buffer.join(name, 0)) for name in "ab"] == [1, 0]
    assert buffer._size_bytes == 0


def test_id_that_comes_twice_counts_once() -> None:
    buffer = build()
    buffer.remember("a", inputs(1))
    buffer.remember("a", inputs(2))
    assert buffer._size_bytes == 8
    np.testing.assert_array_equal(buffer.join("a", 0)[0][0], [2, 2])


def test_request_whose_samples_could_not_be_kept_waits_again() -> None:
    buffer = build()
    buffer.remember("a", inputs(1, 2))
    buffer.restore("a", buffer.join("a", [0, 1]))
    assert len(buffer.join("a", [0, 1])) == 2


def test_bad_target_leaves_the_request_waiting() -> None:
    buffer = build()
    buffer.remember("a", inputs(1))
    with pytest.raises(RequestError, match="expected classes"):
        buffer.join("a", 3, spec=LABEL, labels=LABELS)
    assert buffer.join("a", 2, spec=LABEL, labels=LABELS)


@pytest.mark.parametrize(
    ("target", "rows", "spec", "said"),
    [
        ("red", 1, LABEL, "label 'red': expected one of low, middle, high"),
        ([0, 1], 1, LABEL, r"shape \(1,\), got \(2,\)"),
        (0, 2, LABEL, r"shape \(2,\), got \(\)"),
        (0.5, 1, LABEL, "finite int64"),
        (-1, 1, LABEL, "expected classes"),
        (None, 1, LABEL, "numbers or labels"),
        ([], 1, None, "numbers or labels"),
        ([[1], [2, 3]], 2, None, "one shape"),
        ({"a": 1}, 1, None, "numbers or labels"),
        (10**30, 1, None, "numbers or labels"),
        (float("nan"), 1, None, "finite"),
        ([1, 2, 3], 2, None, "2 targets"),
        (1e300, 1, TensorSpec("y", ("batch",), "float32"), "finite float32"),
    ],
)
def test_what_is_no_target_is_refused(target: object, rows: int, spec: TensorSpec | None, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_target(target, rows, spec=spec, labels=LABELS)


@pytest.mark.parametrize(
    ("target", "rows", "expected"),
    [(2, 1, [2]), ([2], 1, [2]), ([1, 2, 3], 1, [[1, 2, 3]]), ([1, 2], 2, [1, 2]), ([[1], [2]], 2, [[1], [2]])],
)
def test_target_of_a_model_that_does_not_train_is_taken_as_it_is(target: object, rows: int, expected: list) -> None:
    np.testing.assert_array_equal(parse_target(target, rows, spec=None, labels=()), expected)
