"""The engine for most models: the signed train step graph, in onnxruntime."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import onnxruntime as ort

from edge_agent.errors import StalledError
from models.contract.manifest import TRAIN_STEP_NAME
from models.tensors.layout import Layout

_Array: TypeAlias = npt.NDArray[Any]


def open_session(graph: bytes, name: str) -> ort.InferenceSession:
    """Return a session of `graph` on one thread; raises StalledError, which calls it `name`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # serving keeps the other cores
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # fatal only: its errors quote sample values
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no narrower base
        raise StalledError(f"{name} does not open: {f'{error}'.splitlines()[0]:.300}") from error


class OnnxEngine:
    """Runs a train step graph."""

    def __init__(self, graph: bytes, layout: Layout) -> None:
        """Open `graph`, whose parameters are those of `layout`; raises StalledError."""
        self._session = open_session(graph, TRAIN_STEP_NAME)
        expected = ["x", "y", "mask", "clipping_norm", *layout.names]
        found = [node.name for node in self._session.get_inputs()]
        if found != expected:
            raise StalledError(f"{TRAIN_STEP_NAME} has inputs {found}, expected {expected}")
        outputs = len(self._session.get_outputs())
        if outputs != len(layout.names) + 1:
            raise StalledError(f"{TRAIN_STEP_NAME} has {outputs} outputs, expected one a parameter, and the norms")

    def bind(self, inputs: Mapping[str, _Array], outputs: Sequence[_Array]) -> Callable[[], None]:
        """Return what runs the graph on these arrays' own memory: each run would else map new ones.

        Raises:
            StalledError: What the graph returns does not fit where it would be written.
        """
        nodes = self._session.get_outputs()
        for node, array in zip(nodes, outputs, strict=True):
            is_fixed = all(isinstance(length, int) for length in node.shape)  # of another, onnxruntime refuses the run
            if node.type != "tensor(float)" or (is_fixed and node.shape != list(array.shape)):
                raise StalledError(
                    f"{TRAIN_STEP_NAME} returns {node.name} as {node.type} of shape {node.shape}, expected "
                    f"tensor(float) of shape {list(array.shape)}"
                )
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for node, array in zip(nodes, outputs, strict=True):
            binding.bind_output(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return lambda: self._session.run_with_iobinding(binding)
