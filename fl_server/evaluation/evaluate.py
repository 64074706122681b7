"""What parameters and packaged graphs are worth on the server's own held-out data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fl_server.evaluation.metrics import Array, MetricFunction, get_metric, get_metric_name
from fl_server.inference import OnnxGraph, open_graph, run_batches
from models.contract.manifest import Quality, TrainingContract

Part: TypeAlias = tuple[Mapping[str, npt.NDArray[np.float32]], Array, Array]  # parameters, x, y

_DIGITS = Decimal("0.000001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What parameters are worth.

    Attributes:
        value: Of the metric.
        loss: Mean over the samples.
        samples: How many there were.
    """

    value: float
    loss: float
    samples: int


class Evaluator:
    """The evaluation graph of an architecture, loaded once and run after every round."""

    def __init__(self, graph_path: Path, training: TrainingContract, metric: str | MetricFunction) -> None:
        self._session = OnnxGraph(graph_path).session
        self._training = training
        self._metric = get_metric(metric)

    def evaluate(self, parameters: Mapping[str, npt.NDArray[np.float32]], x: Array, y: Array) -> Evaluation:
        """Return what `parameters`, by the names of the layout, are worth on x, y, shapes (n, ...), n >= 1."""
        return self.evaluate_parts([(parameters, x, y)])

    def evaluate_parts(self, parts: Iterable[Part]) -> Evaluation:
        """Return the metric over all `parts` together, each with its parameters; at least one sample each.

        Neighbours that have the same parameters, not equal ones, share the graph's runs.
        """
        loss, outputs, targets = 0.0, list[Array](), list[Array]()
        for _, group in groupby(parts, key=lambda part: id(part[0])):
            named, xs, ys = zip(*group, strict=True)
            part_loss, part_outputs, target = self._run(named[0], np.concatenate(xs), np.concatenate(ys))
            loss += part_loss
            outputs += part_outputs
            targets.append(target)
        y = np.concatenate(targets)
        value = self._metric(np.concatenate(outputs), y)
        return Evaluation(value=float(value), loss=loss / len(y), samples=len(y))

    def _run(
        self, parameters: Mapping[str, npt.NDArray[np.float32]], x: Array, y: Array
    ) -> tuple[float, list[Array], Array]:
        """Return the summed loss, the outputs by batch, and y as the graph takes it."""
        if not len(x) or len(x) != len(y):
            raise ValueError(f"evaluation needs samples, as many x ({len(x)}) as y ({len(y)})")
        named = {name: parameters[name] for name in self._training.layout.names}
        y = y.astype(self._training.target.dtype).reshape(len(y), *self._training.target.row_shape)
        loss, outputs = 0.0, list[Array]()
        for start in range(0, len(x), self._training.batch):
            rows = min(self._training.batch, len(x) - start)
            mask = np.zeros(self._training.batch, np.float32)
            mask[:rows] = 1
            feeds = {"x": self._pad(x[start : start + rows]), "y": self._pad(y[start : start + rows]), "mask": mask}
            batch_loss, output = self._session.run(["loss", "output"], {**feeds, **named})
            loss += float(batch_loss)
            outputs.append(output[:rows])
        return loss, outputs, y

    def _pad(self, rows: Array) -> Array:
        return np.pad(rows, [(0, self._training.batch - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def measure_quality(
    inference_path: Path, float_path: Path, x: Array, y: Array, metric: str | MetricFunction
) -> Quality:
    """Return what the packaged graph, of either runtime, is worth on x, y, shapes (n, ...), n >= 1, beside the float one.

    Both have one input and one output; the float graph is ONNX.
    """
    float_graph = OnnxGraph(float_path)
    feeds = {float_graph.session.get_inputs()[0].name: x}
    (packaged,) = run_batches(open_graph(inference_path), feeds).values()
    (exact,) = run_batches(float_graph, feeds).values()
    function = get_metric(metric)
    return Quality(
        metric=get_metric_name(metric),
        value=_round(function(packaged, y)),
        samples=len(x),
        float_value=_round(function(exact, y)),
        logit_deviation=_round(float(np.abs(packaged.astype(np.float64) - exact).mean())),
    )


def measure_packaged(
    inputs: Mapping[str, Array], y: Array, inference_path: Path, metric: str | MetricFunction
) -> Decimal:
    """Return what the packaged graph, of one output, is worth on `inputs` by name and y, shapes (n, ...), n >= 1.

    Raises:
        ServerError: The runtime does not take the graph.
    """
    (packaged,) = run_batches(open_graph(inference_path), inputs).values()
    return _round(get_metric(metric)(packaged, y))


def _round(value: float) -> Decimal:
    return Decimal(value).quantize(_DIGITS)
