"""What a graph's answers are worth, whatever its outputs are called: labels, class scores, or numbers."""

from collections.abc import Mapping
from decimal import Decimal

import numpy as np

from fl_server.evaluation.metrics import Array, accuracy, rmse
from models.contract.manifest import Quality

_DIGITS = Decimal("0.000001")


def measure_answers(outputs: Mapping[str, Array], y: Array, labels: tuple[str, ...]) -> Quality:
    """Return what `outputs`, by name, are worth against the truth `y`, shape (n, ...).

    Classes (integers or strings) are compared with an output of one such label a row, else with the largest score of
    a row, by `labels` where they are strings: accuracy. Other numbers are compared with the first output of their
    size: rmse. The graph was packaged as it came, so it strays from nothing.

    Raises:
        ValueError: No output says what `y` says.
    """
    metric, value = _compute(outputs, y, labels)
    rounded = Decimal(value).quantize(_DIGITS)
    return Quality(metric=metric, value=rounded, samples=len(y), float_value=rounded, logit_deviation=Decimal(0))


def _compute(outputs: Mapping[str, Array], y: Array, labels: tuple[str, ...]) -> tuple[str, float]:
    if y.dtype.kind == "f":
        for output in outputs.values():
            if output.dtype.kind == "f" and output.size == y.size:
                return "rmse", rmse(output, y)
        raise ValueError(f"y has shape {y.shape}, no output has as many numbers")
    is_named = y.dtype.kind not in "iub"
    for output in outputs.values():
        if output.dtype.kind == ("O" if is_named else "i") and output.size == y.size:
            return "accuracy", float(np.mean(output.ravel() == y.ravel().astype(output.dtype)))
    for output in outputs.values():
        if output.dtype.kind == "f" and output.ndim <= 2:
            return "accuracy", accuracy(output, _find_indices(y, labels) if is_named else y)
    raise ValueError(f"y is of {y.dtype}, no output names or scores classes")


def _find_indices(y: Array, labels: tuple[str, ...]) -> Array:
    places = {label: place for place, label in enumerate(labels)}
    if unknown := {str(name) for name in y.ravel()} - set(places):
        raise ValueError(f"y holds {min(unknown)!r}, labels are {', '.join(labels) or 'not given'}")
    return np.array([places[str(name)] for name in y.ravel()], np.int64)
