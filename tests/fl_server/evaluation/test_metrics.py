import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, mean_squared_error, roc_auc_score

from fl_server.evaluation.metrics import accuracy, auc, get_metric, get_metric_name, rmse


@given(seed=st.integers(0, 2**16), levels=st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_auc_with_ties_is_that_of_scikit_learn(seed, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, 40).astype(np.float32)
    target = np.append(generator.integers(0, 2, 38), [0, 1])
    expected = roc_auc_score(target, scores)
    assert auc(scores, target) == pytest.approx(expected)
    assert auc(scores[:, None], target.astype(np.float32)) == pytest.approx(expected)
    assert auc(np.stack([-scores, scores], 1), target) == pytest.approx(expected)


def test_accuracy_is_that_of_scikit_learn_for_classes_and_for_one_logit():
    generator = np.random.default_rng(0)
    output, target = generator.normal(size=(50, 4)), generator.integers(0, 4, 50)
    assert accuracy(output, target) == accuracy_score(target, output.argmax(1))
    expected = accuracy_score(target > 1, output[:, 0] > 0)
    assert accuracy(output[:, :1], (target > 1).astype(np.float32)) == expected
    assert accuracy(output[:, 0], (target > 1).astype(np.float32)) == expected


def test_rmse_is_that_of_scikit_learn_and_never_broadcasts():
    generator = np.random.default_rng(1)
    output, target = generator.normal(size=(30, 1)).astype(np.float32), generator.normal(size=30)
    assert rmse(output, target) == pytest.approx(mean_squared_error(target, output[:, 0]) ** 0.5)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (np.zeros(3), np.zeros(3), "rows of both classes"),
        (np.zeros((4, 3)), np.array([0, 1, 0, 1]), "one score a row or two classes"),
    ],
)
def test_auc_that_is_undefined_is_refused(output, target, message):
    with pytest.raises(ValueError, match=message):
        auc(output, target)


def test_metric_is_found_by_name_or_is_a_function():
    assert get_metric("rmse") is rmse
    assert get_metric(accuracy) is accuracy
    assert get_metric_name(accuracy) == get_metric_name("accuracy") == "accuracy"
    with pytest.raises(ValueError, match="metric 'f1' is none of accuracy, auc, rmse"):
        get_metric("f1")
