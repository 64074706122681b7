import numpy as np
import pytest

from edge_agent.errors import StalledError
from edge_agent.training.sensitivity import check_sensitivity, random_rows
from models.tensors.spec import TensorSpec

GENERATOR = np.random.default_rng(0)
FIRST, SECOND = ((GENERATOR.normal(size=(8, 3)), GENERATOR.normal(size=8)) for _ in range(2))


def clip(gradients, clipping_norm):
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1, clipping_norm / norms)


def test_sum_of_clipped_gradients_passes():
    check_sensitivity(lambda x, y, norm: clip(x * y[:, None], norm).sum(0), FIRST, SECOND)


@pytest.mark.parametrize(
    "sabotaged",
    [
        lambda x, y, _norm: (x * y[:, None]).sum(0),
        lambda x, y, norm: clip(x * y[:, None], 5 * norm).sum(0),
        lambda x, y, norm: clip(x * y[:, None], norm).sum(0) * len(x),
        lambda x, y, norm: clip((x - x.mean(0)) * len(x) + x, norm).sum(0) * 2,
        lambda x, y, norm: np.concatenate([clip(x, norm).sum(0), clip(y[:, None], norm).sum(0)]),  # a norm a tensor
    ],
    ids=[
        "ignores the clip",
        "five times the clip",
        "times the batch",
        "centred on the batch",
        "clips each tensor alone",
    ],
)
def test_sum_that_does_not_bound_a_sample_is_refused(sabotaged):
    with pytest.raises(StalledError, match="does not clip"):
        check_sensitivity(sabotaged, FIRST, SECOND)


@pytest.mark.parametrize("value", [0.0, np.nan, 1e9])
def test_gradients_that_cannot_be_measured_are_refused(value):
    with pytest.raises(StalledError, match="nothing to measure"):
        check_sensitivity(lambda _x, _y, _norm: np.full(3, value), FIRST, SECOND)


def test_random_integers_are_valid_in_every_vocabulary_and_floats_vary():
    tokens = random_rows(TensorSpec("x", ("batch", 24), "int64"), 8, GENERATOR)
    assert (tokens.shape, tokens.dtype, set(tokens.ravel().tolist())) == ((8, 24), np.int64, {0, 1})
    features = random_rows(TensorSpec("x", ("batch", 2, 2), "float32"), 8, GENERATOR)
    assert (features.shape, features.dtype, np.unique(features).size) == ((8, 2, 2), np.float32, 32)
