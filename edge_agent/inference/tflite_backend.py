"""LiteRT, or the older tflite-runtime behind the same code, for TFLite graphs.

One interpreter under a lock, not one a thread: versions are loaded on another thread than the one that answers, so
every version would be held twice, packed weights and all.
"""

import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.errors import AgentError, RequestError, StalledError
from edge_agent.inference.backend import Array

_RUNTIMES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")


class TfliteBackend:
    """A TFLite graph in an interpreter of its own; one whose batch is fixed at 1 runs row by row."""

    def __init__(self, path: Path) -> None:
        """Load the graph at `path`.

        Raises:
            StalledError: Unreadable, no TFLite graph, or there is no runtime that works.
        """
        try:
            graph = path.read_bytes()
        except OSError as error:
            raise StalledError(f"{path}: {error.strerror or error}") from error
        try:
            self._interpreter = _open_interpreter(graph)
            inputs, outputs = _list_tensors(self._interpreter)
            self._interpreter.allocate_tensors()
        except AgentError as error:
            raise StalledError(f"{path}: {error}") from error
        except Exception as error:  # LiteRT's errors have no base of their own
            raise StalledError(f"{path}: LiteRT refuses the graph: {_one_line(error)}") from error
        self._inputs = {name: (details["index"], np.dtype(details["dtype"])) for name, details in inputs.items()}
        self._outputs = {name: details["index"] for name, details in outputs.items()}
        self._is_free = all(details["shape_signature"][:1].tolist() == [-1] for details in inputs.values())
        self._rows = 0  # that a graph with a free batch has room for
        self._lock = threading.Lock()

    @property
    def input_names(self) -> Sequence[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> Sequence[str]:
        return list(self._outputs)

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        try:
            given = []
            for name, array in inputs.items():
                index, dtype = self._inputs[name]
                given.append((index, array if array.dtype == dtype else _convert(array, dtype)))
            rows = len(given[0][1])
            with self._lock:
                if self._is_free and rows != self._rows:
                    self._resize(given, rows)
                if self._is_free or rows == 1:
                    return self._invoke(given)
                parts = [self._invoke([(index, array[row : row + 1]) for index, array in given]) for row in range(rows)]
            return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        except Exception as error:
            raise RequestError(f"the model cannot run on these inputs: {_one_line(error)}") from error

    def _invoke(self, given: list[tuple[int, Array]]) -> list[Array]:
        interpreter = self._interpreter
        for index, array in given:
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in self._outputs.values()]

    def _resize(self, given: list[tuple[int, Array]], rows: int) -> None:
        self._rows = 0  # should it fail half way, the next run begins anew
        for index, array in given:
            self._interpreter.resize_tensor_input(index, array.shape, strict=True)
        self._interpreter.allocate_tensors()
        self._rows = rows


def _open_interpreter(graph: bytes) -> Any:
    """Return an interpreter of the first runtime that can build one."""
    found = []
    for name in _RUNTIMES:
        package = name.partition(".")[0].replace("_", "-")
        try:
            return import_module(name).Interpreter(model_content=graph, num_threads=1)
        except ModuleNotFoundError:
            continue
        except (ImportError, SystemError):  # built against another NumPy or C library: some notice only here
            found.append(f"{package} is there and does not work with NumPy {np.__version__} or this machine; ")
    raise StalledError(f"{''.join(found)}a TFLite graph needs LiteRT: pip install 'edge-fl[tflite]'")


def _list_tensors(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs and outputs by their names in the signature, or by their own without one."""
    if len(interpreter.get_signature_list()) == 1:
        runner = interpreter.get_signature_runner()
        return runner.get_input_details(), runner.get_output_details()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    return {tensor["name"]: tensor for tensor in inputs}, {tensor["name"]: tensor for tensor in outputs}


def _convert(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return int64 as the int32 that exports take; other differences are the interpreter's to refuse."""
    if array.dtype.name != "int64" or dtype.name != "int32":
        return array
    converted = array.astype(np.int32)
    if not np.array_equal(converted, array):
        raise ValueError("a number does not fit into int32, which the graph takes")
    return converted


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
