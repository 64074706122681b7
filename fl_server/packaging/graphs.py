"""ONNX graphs as documents: reading, writing, and what is changed in them; needs no torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fl_server.errors import DefinitionError

_COMPACT_FROM = 64  # values; smaller constants cost less than the node that would make them


def load_graph(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write `graph` to `path`, weights inside; equal graphs give equal bytes."""
    path.write_bytes(graph.SerializeToString(deterministic=True))


def build_with_parameters(graph: onnx.ModelProto, parameters: Mapping[str, npt.NDArray[np.float32]]) -> onnx.ModelProto:
    """Return a copy of the float `graph` with `parameters` as its initializers.

    Raises:
        DefinitionError: A parameter has no initializer of its name and shape.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    initializers = {initializer.name: initializer for initializer in changed.graph.initializer}
    for name, array in parameters.items():
        if name not in initializers:
            raise DefinitionError(f"parameter {name!r} is not in the inference graph: the output does not depend on it")
        initializer = initializers[name]
        if tuple(initializer.dims) != array.shape:
            raise DefinitionError(
                f"parameter {name!r} has shape {array.shape}, the inference graph has {tuple(initializer.dims)}"
            )
        initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return changed


def bind_inputs(graph: onnx.ModelProto, parameters: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Turn the inputs that `parameters` name into initializers.

    Parameters are exported as inputs because the exporter folds, transposes and merges what it knows to be
    constant: two biases of zeros became one.
    """
    inputs = [value for value in graph.graph.input if value.name not in parameters]
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    graph.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in parameters.items())


def fold_transposes(graph: onnx.ModelProto) -> None:
    """Transpose initializers once and for all; quantization sees weights only where they are initializers."""
    initializers = {initializer.name: initializer for initializer in graph.graph.initializer}
    kept = []
    for node in graph.graph.node:
        if node.op_type != "Transpose" or node.input[0] not in initializers:
            kept.append(node)
            continue
        permutation = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        array = numpy_helper.to_array(initializers[node.input[0]]).transpose(permutation)
        graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
    used = {name for node in kept for name in node.input}
    remaining = [initializer for initializer in graph.graph.initializer if initializer.name in used]
    del graph.graph.initializer[:], graph.graph.node[:]
    graph.graph.initializer.extend(remaining)
    graph.graph.node.extend(kept)


def compact_constants(graph: onnx.ModelProto) -> None:
    """Replace each large initializer of one repeated value by a node that fills it in, for graphs that travel."""
    kept, nodes, shapes = [], [], []
    for initializer in graph.graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.size < _COMPACT_FROM or (array != array.flat[0]).any():
            kept.append(initializer)
            continue
        shape_name = f"{initializer.name}/shape"
        shapes.append(numpy_helper.from_array(np.array(array.shape, np.int64), shape_name))
        value = numpy_helper.from_array(array.reshape(-1)[:1])
        nodes.append(helper.make_node("ConstantOfShape", [shape_name], [initializer.name], value=value))
    remaining = [*nodes, *graph.graph.node]
    del graph.graph.initializer[:], graph.graph.node[:]
    graph.graph.initializer.extend([*kept, *shapes])
    graph.graph.node.extend(remaining)


def strip_metadata(graph: onnx.ModelProto) -> None:
    """Remove the exporter's notes: stack traces with file names of this machine, half of a small graph's bytes."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    of_graph = graph.graph
    for item in (*of_graph.node, *of_graph.initializer, *of_graph.input, *of_graph.output, *of_graph.value_info):
        del item.metadata_props[:]
        item.doc_string = ""


def name_batch_axis(graph: onnx.ModelProto) -> None:
    """Call the first axis of the first input, and every axis of that length, "batch" instead of torch's symbol."""
    symbol = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for length in value.type.tensor_type.shape.dim:
            if length.dim_param == symbol != "":
                length.dim_param = "batch"
