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
        self._rows = 0 if self._is_free else 1  # that the graph has room for
        # What the interpreter's methods come down to, without their checks for views of tensors, which are never
        # taken here: a tenth of the time of a small graph.
        self._inner = self._interpreter._interpreter  # noqa: SLF001
        self._set, self._invoke, self._get = self._inner.SetTensor, self._inner.Invoke, self._inner.GetTensor
        self._only_input = next(iter(self._inputs)) if len(inputs) == len(outputs) == 1 else None
        self._index, self._dtype = next(iter(self._inputs.values()))
        self._output_index = next(iter(self._outputs.values()))
        self._lock = threading.Lock()

    @property
    def input_names(self) -> Sequence[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> Sequence[str]:
        return list(self._outputs)

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        try:
            array = next(iter(inputs.values())) if self._only_input is None else inputs[self._only_input]
            with self._lock:
                if len(array) != self._rows:
                    return self._run_rows(inputs, len(array))
                if self._only_input is None or array.dtype is not self._dtype:
                    return self._run_once(inputs)
                self._set(self._index, array)
                self._invoke()
                return (self._get(self._output_index, 0),)
        except Exception as error:
            raise RequestError(f"the model cannot run on these inputs: {_one_line(error)}") from error

    def _run_once(self, inputs: Mapping[str, Array]) -> list[Array]:
        for name, array in inputs.items():
            index, dtype = self._inputs[name]
            self._set(index, array if array.dtype == dtype else _convert(array, dtype))
        self._invoke()
        return [self._get(index, 0) for index in self._outputs.values()]

    def _run_rows(self, inputs: Mapping[str, Array], rows: int) -> list[Array]:
        """Run on another number of rows than the graph has room for."""
        if self._is_free:
            self._rows = 0  # should it fail half way, the next run begins anew
            for name, array in inputs.items():
                self._inner.ResizeInputTensor(self._inputs[name][0], np.array(array.shape, np.int32), True)
            self._inner.AllocateTensors()
            self._rows = rows
            return self._run_once(inputs)
        parts = [self._run_once({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(rows)]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


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
