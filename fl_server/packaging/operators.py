"""What an ONNX graph from elsewhere may hold: standard operators, and its weights inside."""

from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from fl_server.errors import DefinitionError

_STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
# Of onnxruntime's own operators, those that its quantizer writes.
_QUANTIZED_DOMAIN = "com.microsoft"
_QUANTIZED = frozenset({
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QAttention", "QEmbedLayerNormalization", "QGemm", "QLinearAdd", "QLinearMul", "QLinearWhere", "QLinearConcat"),
    *("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool", "QLinearGlobalAveragePool"),
})  # fmt: skip


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse operators that a device's runtime does not bring, and data outside of the file.

    Raises:
        DefinitionError: There is one; names it.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for node in _walk(node for nodes in bodies for node in nodes):
        is_known = node.domain in _STANDARD or (node.domain, node.op_type) in functions
        if not is_known and not (node.domain == _QUANTIZED_DOMAIN and node.op_type in _QUANTIZED):
            raise DefinitionError(
                f"operator {node.domain}.{node.op_type} is custom: devices run ai.onnx and ai.onnx.ml, "
                "and what onnxruntime's quantizer writes"
            )
        for attribute in node.attribute:
            _check_inside([attribute.t, *attribute.tensors])
            for graph in _get_graphs(attribute):
                _check_graph(graph)
    _check_graph(model.graph)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether a node of `model` already computes in integers."""
    return any("Quantize" in node.op_type or "Integer" in node.op_type for node in _walk(model.graph.node))


def _walk(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield `nodes` and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _get_graphs(attribute):
                yield from _walk(graph.node)


def _get_graphs(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _check_graph(graph: GraphProto) -> None:
    _check_inside(
        [*graph.initializer, *(part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))]
    )


def _check_inside(tensors: Iterable[TensorProto]) -> None:
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise DefinitionError(
                f"tensor {tensor.name!r} lies in another file: save the model with its data inside (onnx.save_model)"
            )
