"""Quality of predictions in one number; NumPy only."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
MetricFunction: TypeAlias = Callable[[Array, Array], float]


def accuracy(output: Array, target: Array) -> float:
    """Return the share of rows whose largest output is the target.

    Args:
        output: Raw outputs, shape (n, classes); or one logit a row, shape (n,) or (n, 1), positive for class 1.
        target: Classes, shape (n,).
    """
    if output.ndim == 1 or output.shape[1] == 1:
        predicted = (output.reshape(len(output)) > 0).astype(np.int64)
    else:
        predicted = output.argmax(1)
    return float(np.mean(predicted == target.reshape(predicted.shape)))


def auc(output: Array, target: Array) -> float:
    """Return the area under the ROC curve: how often a row of class 1 scores above one of class 0, ties by half.

    Args:
        output: One score a row, shape (n,) or (n, 1), or logits of two classes, shape (n, 2).
        target: Classes 0 and 1, shape (n,).

    Raises:
        ValueError: More than two classes, or only one of them in `target`.
    """
    if output.ndim == 2 and output.shape[1] == 2:
        output = output[:, 1] - output[:, 0]
    scores, is_positive = output.reshape(-1), target.reshape(-1) > 0.5
    if len(scores) != len(is_positive):
        raise ValueError(f"auc needs one score a row or two classes, output has shape {output.shape}")
    positives = int(is_positive.sum())
    negatives = len(is_positive) - positives
    if not positives or not negatives:
        raise ValueError("auc needs rows of both classes")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    ranks = (last_rank - (counts - 1) / 2)[place]
    return float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def rmse(output: Array, target: Array) -> float:
    """Return the root of the mean squared difference, over all values."""
    difference = output.reshape(target.shape).astype(np.float64) - target
    return float(np.sqrt(np.mean(difference * difference)))


METRICS: Mapping[str, MetricFunction] = {"accuracy": accuracy, "auc": auc, "rmse": rmse}
LOWER_IS_BETTER = frozenset({"rmse"})


def get_metric(metric: str | MetricFunction) -> MetricFunction:
    """Return the function that `metric` names or is.

    Raises:
        ValueError: No metric of that name.
    """
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    return METRICS[metric]


def get_metric_name(metric: str | MetricFunction) -> str:
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", "custom"))
