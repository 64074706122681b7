import numpy as np
import pytest

from fl_server.evaluation.answers import measure_answers

SCORES = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32)
NAMES = np.array(["no", "yes", "no"], object)


@pytest.mark.parametrize(
    ("outputs", "y", "labels", "metric", "value"),
    [
        ({"label": np.array([0, 1, 1]), "probabilities": SCORES}, np.array([0, 1, 0]), (), "accuracy", "0.666667"),
        ({"probabilities": SCORES}, np.array([0, 1, 0], np.uint8), (), "accuracy", "1.000000"),
        ({"label": NAMES, "probabilities": SCORES}, np.array(["no", "no", "no"]), (), "accuracy", "0.666667"),
        ({"probabilities": SCORES}, np.array(["no", "yes", "yes"]), ("no", "yes"), "accuracy", "0.666667"),
        ({"variable": np.array([[1.0], [2.0]], np.float32)}, np.array([1.0, 4.0]), (), "rmse", "1.414214"),
    ],
)
def test_answers_are_compared_with_the_output_that_says_the_same(outputs, y, labels, metric, value):
    quality = measure_answers(outputs, y, labels)
    assert (quality.metric, str(quality.value), quality.samples) == (metric, value, len(y))
    assert quality.float_value == quality.value
    assert quality.logit_deviation == 0


@pytest.mark.parametrize(
    ("outputs", "y", "message"),
    [
        ({"label": np.array([0, 1, 1])}, np.array(["no", "yes", "no"]), "y is of <U3, no output names or scores"),
        ({"probabilities": SCORES}, np.array(["no", "yes", "no"]), "y holds 'no', labels are not given"),
        ({"probabilities": SCORES}, np.array([0.5, 0.1, 0.2]), "no output has as many numbers"),
    ],
)
def test_truth_that_no_output_speaks_of_is_refused(outputs, y, message):
    with pytest.raises(ValueError, match=message):
        measure_answers(outputs, y, ())
