"""Answers the rows of an npz file with a TFLite graph: GRAPH INPUTS OUTPUTS; runs where only the older runtime is."""

import sys
from pathlib import Path

import numpy as np

from edge_agent.inference.tflite_backend import TfliteBackend

graph, inputs, outputs = sys.argv[1:]
backend = TfliteBackend(Path(graph))
with np.load(inputs) as arrays:
    given = {name: arrays[name] for name in backend.input_names}
found = {
    f"{name}_{rows}": array
    for rows in (1, 5, 1, 32)
    for name, array in zip(
        backend.output_names, backend.run({name: array[:rows] for name, array in given.items()}), strict=True
    )
}
np.savez(outputs, **found)
print(np.__version__, *sorted(name for name in ("tflite_runtime", "ai_edge_litert", "msgspec") if name in sys.modules))
