"""Float or int8: what each costs and how far it strays, and which is packaged."""

import platform
import statistics
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_server.errors import DefinitionError
from fl_server.inference import Graph, list_graph_files, open_graph
from models.contract.manifest import Figures, Measured, Precision, Preference, Quality

BATCH = 16
_RUNS, _BUDGET_S = 200, 0.1  # of one median, whichever ends first
_CLEARLY_FASTER = Decimal("0.95")  # of the other's time; what lies between is noise, and the smaller one wins


class StrayingError(DefinitionError):
    """The packaged outputs are too far from the module's.

    Attributes:
        quality: What the version would have been worth, if that is known.
    """

    def __init__(self, model: str, deviation: float, tolerance: float, quality: Quality | None) -> None:
        super().__init__(
            f"{model}: the packaged outputs stray from the module's by {deviation:.3f} of their spread, tolerated are "
            f"{tolerance:g}: give calibration data like the real inputs, or raise logit_tolerance in the definition"
        )
        self.quality = quality


def measure_figures(path: Path, rows: Mapping[str, npt.NDArray[Any]]) -> Figures:
    """Return what the graph at `path` costs on `rows`, inputs by name, each of >= 1 rows; takes at most 0.3 s."""
    graph = open_graph(path)
    batch = {name: np.resize(array, (BATCH, *array.shape[1:])) for name, array in rows.items()}
    return Figures(
        size_bytes=sum(file.stat().st_size for file in list_graph_files(path)),
        row_us=_measure_us(graph, {name: array[:1] for name, array in batch.items()}),
        batch_us=_measure_us(graph, batch),
    )


def choose_precision(float32: Figures, int8: Figures, prefer: Preference) -> Measured:
    """Return which of two graphs of the same parameters is packaged, and why. Pure, but for the machine's name."""
    is_smaller = int8.size_bytes < float32.size_bytes
    if prefer == "size":
        packaged: Precision = "int8" if is_smaller else "float32"
    elif int8.row_us < _CLEARLY_FASTER * float32.row_us:
        packaged = "int8"
    elif float32.row_us < _CLEARLY_FASTER * int8.row_us:
        packaged = "float32"
    else:
        packaged = "int8" if is_smaller else "float32"
    return Measured(
        packaged=packaged, prefer=prefer, machine=platform.machine(), batch=BATCH, float32=float32, int8=int8
    )


def compute_deviation(packaged: npt.NDArray[Any], exact: npt.NDArray[Any]) -> float:
    """Return the mean absolute difference of two arrays of outputs, as a share of the spread of the `exact` ones.

    The spread is their standard deviation; where they hardly vary, as before any training, a hundredth of the largest.
    """
    wide = exact.astype(np.float64)
    difference = float(np.abs(packaged.astype(np.float64) - wide).mean())
    spread = max(float(wide.std()), 0.01 * float(np.abs(wide).max()))
    if difference == 0:
        return 0.0
    return difference / spread if spread else float("inf")


def _measure_us(graph: Graph, inputs: Mapping[str, npt.NDArray[Any]]) -> Decimal:
    graph.run(inputs)
    durations: list[int] = []
    deadline = time.perf_counter() + _BUDGET_S
    while len(durations) < _RUNS and (not durations or time.perf_counter() < deadline):
        begun = time.perf_counter_ns()
        graph.run(inputs)
        durations.append(time.perf_counter_ns() - begun)
    return Decimal(round(statistics.median(durations) / 100)) / 10
