import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fl_server.rounds import robust
from fl_server.rounds.aggregation import check_update
from fl_server.rounds.robust import aggregate
from fl_server.rounds.rule import Aggregation
from fl_server.rounds.spool import Spool
from models.tensors.layout import build_vector_bytes


def apply_rule(updates: np.ndarray, rule: str, byzantine: int) -> np.ndarray:
    count, size = updates.shape
    aggregation = Aggregation(rule=rule, byzantine=byzantine)
    return aggregate(lambda start, stop: updates[:, start:stop].copy(), count=count, size=size, aggregation=aggregation)


def build_updates(seed: int, count: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def choose_by_definition(updates: np.ndarray, byzantine: int) -> list[int]:
    """Return multi-Krum's choice as the paper writes it, one pair at a time."""
    kept = len(updates) - byzantine - 2
    scores = []
    for one in updates.astype(np.float64):
        distances = sorted(float(np.sum((one - other) ** 2)) for other in updates.astype(np.float64))
        scores.append(sum(distances[1 : kept + 1]))  # without itself
    return sorted(np.argsort(scores)[:kept].tolist())


@given(seed=st.integers(0, 10**6), byzantine=st.integers(1, 3), more=st.integers(0, 4), size=st.integers(1, 30))
def test_every_rule_is_what_its_definition_says_whatever_the_blocks(seed, byzantine, more, size):
    updates = build_updates(seed, 2 * byzantine + 3 + more, size)
    in_order = np.sort(updates.astype(np.float64), axis=0)
    shortest = np.argsort(np.linalg.norm(updates.astype(np.float64), axis=1))[: len(updates) - byzantine]
    expected = {
        "median": np.median(updates.astype(np.float64), axis=0),
        "trimmed-mean": in_order[byzantine:-byzantine].mean(axis=0),
        "multi-krum": updates[choose_by_definition(updates, byzantine)].mean(axis=0, dtype=np.float64),
        "norm-filter": updates[shortest].mean(axis=0, dtype=np.float64),
    }
    for block_values in (1, 3 * len(updates), robust._BLOCK_VALUES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(robust, "_BLOCK_VALUES", block_values)
            for rule, step in expected.items():
                np.testing.assert_allclose(apply_rule(updates, rule, byzantine), step, rtol=1e-6, atol=1e-6)


@given(
    seed=st.integers(0, 10**6),
    byzantine=st.integers(1, 4),
    more=st.integers(0, 3),
    rule=st.sampled_from(["median", "trimmed-mean"]),
    hostile=st.lists(st.floats(-1e30, 1e30), min_size=4, max_size=4),
)
def test_minority_moves_no_coordinate_beyond_what_honest_devices_sent(seed, byzantine, more, rule, hostile):
    honest = build_updates(seed, byzantine + 1 + more, 5)
    sent = np.vstack([honest, *(np.full((1, 5), value, np.float32) for value in hostile[:byzantine])])
    step = apply_rule(sent, rule, byzantine)
    assert (step >= honest.min(axis=0) - 1e-6).all()
    assert (step <= honest.max(axis=0) + 1e-6).all()


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "multi-krum", "norm-filter"])
def test_fewer_updates_than_a_rule_needs_are_not_aggregated(rule):
    least = Aggregation(rule=rule, byzantine=2).least_updates
    with pytest.raises(ValueError, match=f"needs {least} updates"):
        apply_rule(np.ones((least - 1, 3), np.float32), rule, 2)


def test_multi_krum_never_keeps_colluders_that_lie_close_together_and_far_from_the_rest():
    honest = build_updates(1, 9, 50)
    colluding = np.repeat(build_updates(2, 1, 50) + 10, 3, axis=0)
    updates = np.vstack([colluding, honest])
    gram = robust.compute_gram(lambda start, stop: updates[:, start:stop], count=12, size=50)
    chosen = robust.choose_nearest(gram, 3)
    assert len(chosen) == 7
    assert chosen.min() >= 3


DEVICES, HOSTILE, ROUNDS = 12, 3, 25
FLOOR = 0.85


class Digits:
    """Softmax regression on real digits, split over the devices."""

    def __init__(self) -> None:
        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        self.x, self.y = np.hstack([x / 16, np.ones((len(x), 1))])[order], y[order]
        self.shares = np.array_split(np.arange(1200), DEVICES)

    def train(self, parameters: np.ndarray, device: int, *, shift: int = 0) -> np.ndarray:
        """Return the update of ten steps on a device's own samples, with labels that are `shift` too high."""
        x, y = self.x[self.shares[device]], (self.y[self.shares[device]] + shift) % 10
        weights = parameters.reshape(65, 10).astype(np.float64)
        for _ in range(10):
            weights = weights - 0.5 * x.T @ (_softmax(x @ weights) - np.eye(10)[y]) / len(x)
        return (weights.ravel() - parameters).astype(np.float32)

    def measure(self, parameters: np.ndarray) -> float:
        return float(np.mean((self.x[1200:] @ parameters.reshape(65, 10)).argmax(axis=1) == self.y[1200:]))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def flip_signs(digits, parameters, honest):
    return [-5 * digits.train(parameters, device) for device in range(HOSTILE)]


def scale_up(digits, parameters, honest):
    return [20 * digits.train(parameters, device, shift=1) for device in range(HOSTILE)]


def collude(digits, parameters, honest):
    return [-4 * np.mean(honest, axis=0)] * HOSTILE


def run_under_attack(digits: Digits, attack, aggregation: Aggregation, directory) -> float:
    """Return the accuracy after all rounds, every update checked, spooled and aggregated as a coordinator does."""
    parameters = np.zeros(650, np.float32)
    for number in range(ROUNDS):
        honest = [digits.train(parameters, device) for device in range(HOSTILE, DEVICES)]
        spool = Spool(directory / str(number), 650)
        for device, sent in enumerate([*attack(digits, parameters, honest), *honest]):
            update = check_update(build_vector_bytes(np.float32(sent)), size=650, norm_limit=1e3)
            assert not isinstance(update, str), update
            spool.add(f"device-{device}", update)
        step = aggregate(spool.read_columns, count=DEVICES, size=650, aggregation=aggregation)
        parameters = (parameters + step).astype(np.float32)
    return digits.measure(parameters)


@pytest.mark.parametrize(
    ("attack", "rules"),
    [
        (flip_signs, ["median", "trimmed-mean", "multi-krum"]),
        (scale_up, ["median", "trimmed-mean", "multi-krum", "norm-filter"]),
        (collude, ["median", "trimmed-mean", "multi-krum"]),
    ],
)
def test_digits_are_learnt_against_a_hostile_quarter_and_not_with_the_mean(attack, rules, tmp_path):
    digits = Digits()
    for rule in rules:
        aggregation = Aggregation(rule=rule, byzantine=HOSTILE)
        assert run_under_attack(digits, attack, aggregation, tmp_path / rule) >= FLOOR, rule
    assert run_under_attack(digits, attack, Aggregation(), tmp_path / "mean") < FLOOR
