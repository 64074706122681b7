"""Golden samples for a version: as many rows of the data at hand as fit into a few kilobytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_server.inference import open_graph
from fl_server.packaging.staging import describe_file
from models.contract.golden import Golden, build_golden, explain_straying
from models.contract.manifest import GOLDEN_NAME, FileEntry
from models.tensors.spec import TensorSpec

FILE_MAX_BYTES = 3 * 1024  # every device fetches it with every version
_ROWS = 8


def write_golden(
    graph_path: Path,
    data: Mapping[str, npt.NDArray[Any]],
    *,
    inputs: tuple[TensorSpec, ...],
    tolerance: float,
) -> FileEntry | None:
    """Write golden samples beside the packaged graph at `graph_path`; return None, and write none, if no row fits.

    There are none either where the graph does not answer with finite numbers: no device could find them again.

    Args:
        graph_path: The graph as devices get it.
        data: Inputs by name, of >= 1 rows: of the coordinator's own, since every device will have them.
        inputs: What the version's inputs look like.
        tolerance: Of the outputs, relative to their spread.
    """
    graph, path, rows = open_graph(graph_path), graph_path.with_name(GOLDEN_NAME), _ROWS
    while rows:
        available = len(next(iter(data.values())))
        chosen = np.unique(np.linspace(0, available - 1, min(rows, available)).astype(np.int64))
        feeds = {spec.name: data[spec.name][chosen].astype(spec.numpy_dtype, copy=False) for spec in inputs}
        golden = Golden(inputs=feeds, outputs=graph.run(feeds), tolerance=tolerance)
        with np.errstate(invalid="ignore", over="ignore"):
            if explain_straying(golden, golden.outputs) is not None:
                return None
        if len(file := build_golden(golden)) <= FILE_MAX_BYTES:
            path.write_bytes(file)
            return describe_file(path)
        rows //= 2
    return None
