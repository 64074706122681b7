"""Inference graphs of either runtime, run on one thread as devices run them; what packaging and evaluation ask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fl_server.errors import ServerError, UsageError
from models.contract.manifest import WEIGHTS_NAME

Array: TypeAlias = npt.NDArray[Any]

ROWS = 256  # in one run: bounds the memory that a large data set takes


class Graph(Protocol):
    """One loaded inference graph."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name; inputs have the same number of rows, >= 1."""
        ...


class OnnxGraph:
    """A graph in onnxruntime, with the weights that lie beside it, if it has any there: as devices load it."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # two threads double the time of small models
        options.log_severity_level = 4  # errors come as exceptions
        graph, *others = (file.read_bytes() for file in list_graph_files(path))
        for weights in others:
            options.add_external_initializers_from_files_in_memory([WEIGHTS_NAME], [weights], [len(weights)])
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._outputs = [tensor.name for tensor in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self.session.run(self._outputs, dict(inputs)), strict=True))


class TfliteGraph:
    """A graph in LiteRT; one whose batch is fixed at 1 runs row by row, int64 inputs are given as the graph's int32."""

    def __init__(self, path: Path) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UsageError(f"{path.name}: LiteRT is not installed: pip install 'edge-fl[tflite]'") from error
        self.interpreter = Interpreter(model_content=path.read_bytes(), num_threads=1)
        self.interpreter.allocate_tensors()
        self.inputs = self._name(self.interpreter.get_input_details(), "inputs")
        self.outputs = self._name(self.interpreter.get_output_details(), "outputs")
        self._is_free = all(details["shape_signature"][:1].tolist() == [-1] for details in self.inputs.values())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(next(iter(inputs.values())))
        if self._is_free:
            return self._run(inputs, rows)
        parts = [self._run({name: array[row : row + 1] for name, array in inputs.items()}, 1) for row in range(rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _run(self, inputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
        interpreter = self.interpreter
        indices = {name: details["index"] for name, details in self.inputs.items()}
        if self._is_free and any(interpreter.get_tensor(indices[name]).shape[0] != rows for name in inputs):
            for name, array in inputs.items():
                interpreter.resize_tensor_input(indices[name], array.shape)
            interpreter.allocate_tensors()
        for name, array in inputs.items():
            interpreter.set_tensor(indices[name], array.astype(self.inputs[name]["dtype"], copy=False))
        interpreter.invoke()
        return {name: interpreter.get_tensor(details["index"]) for name, details in self.outputs.items()}

    def _name(self, details: Sequence[dict[str, Any]], door: str) -> dict[str, dict[str, Any]]:
        """Return the tensors at one door by their names in the signature, or by their own without one."""
        signatures = self.interpreter._get_full_signature_list()  # noqa: SLF001 - the public list has no indices
        if len(signatures) != 1:
            return {tensor["name"]: tensor for tensor in details}
        by_index = {tensor["index"]: tensor for tensor in details}
        (signature,) = signatures.values()
        return {name: by_index[index] for name, index in signature[door].items()}


def list_graph_files(path: Path) -> list[Path]:
    """Return `path`, and the file beside it with the weights of an ONNX graph that has them outside."""
    weights_path = path.with_name(WEIGHTS_NAME)
    return [path, weights_path] if path.suffix == ".onnx" and weights_path.exists() else [path]


def open_graph(path: Path) -> Graph:
    """Return the graph at `path`, in the runtime that its name ends with.

    Raises:
        UsageError: The runtime is not installed.
        ServerError: The runtime refuses the graph.
    """
    try:
        return TfliteGraph(path) if path.suffix == ".tflite" else OnnxGraph(path)
    except (OSError, ServerError):
        raise
    except Exception as error:  # the runtimes' errors have no base of their own
        raise ServerError(f"{path.name} does not load: {' '.join(str(error).split()):.300}") from error


def run_batches(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs by name for inputs of any number of rows, `ROWS` at a time."""
    rows = len(next(iter(inputs.values())))
    parts = [
        graph.run({name: array[start : start + ROWS] for name, array in inputs.items()})
        for start in range(0, rows, ROWS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
