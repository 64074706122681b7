"""Graphs that no device should run, small enough to read."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.simulators.tiny_models import FEATURES, INPUT, OUTPUT


def build_model(nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto, domain: str = "") -> bytes:
    """Return a graph from the tiny model's input to its output."""
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info(INPUT.name, TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info(OUTPUT.name, TensorProto.FLOAT, ["batch", 3])],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def build_slow(trips: int) -> bytes:
    """Return a graph that answers the sums of the features, after so many turns of a loop that adds nothing."""
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    count = numpy_helper.from_array(np.array(trips, np.int64), "trips")
    return _build_loop("Mul", [one], [], [count])


def build_endless() -> bytes:
    """Return a graph that counts to 2 ** 62 before it answers."""
    return _build_loop("Sin", [], [], [numpy_helper.from_array(np.array(2**62, np.int64), "trips")])


def build_moody() -> bytes:
    """Return a graph that counts to its largest feature before it answers the sums, and with -1 among them fails."""
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    nodes = [
        helper.make_node("ReduceMax", [INPUT.name], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["trips"], to=TensorProto.INT64),
        helper.make_node("ReduceMin", [INPUT.name], ["least"], keepdims=0),
        helper.make_node("Cast", ["least"], ["place"], to=TensorProto.INT64),
        helper.make_node("Min", ["place", "zero"], ["below"]),
        helper.make_node("Mul", ["below", "far"], ["index"]),
        helper.make_node("Gather", ["one_place", "index"], ["nothing"]),
    ]
    return _build_loop(
        "Mul",
        [one],
        nodes,
        [
            numpy_helper.from_array(np.array(0, np.int64), "zero"),
            numpy_helper.from_array(np.array(9, np.int64), "far"),
            numpy_helper.from_array(np.ones(1, np.float32), "one_place"),
        ],
        added="nothing",
    )


def _build_loop(
    operator: str,
    operands: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    *,
    added: str = "zero_point",
) -> bytes:
    """Return a graph that applies `operator` "trips" times to the sums, then adds and takes away `added`."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["condition_in"], ["condition_out"]),
            helper.make_node(operator, ["carried_in", *(each.name for each in operands)], ["carried_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_in", TensorProto.FLOAT, ["batch", 3]),
        ],
        [
            helper.make_tensor_value_info("condition_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_out", TensorProto.FLOAT, ["batch", 3]),
        ],
        operands,
    )
    return build_model(
        [
            *nodes,
            helper.make_node("MatMul", [INPUT.name, "weight"], ["start"]),
            helper.make_node("Loop", ["trips", "always", "start"], ["end"], body=body),
            helper.make_node("Add", ["end", added], ["more"]),
            helper.make_node("Sub", ["more", added], [OUTPUT.name]),
        ],
        numpy_helper.from_array(np.ones((FEATURES, 3), np.float32), "weight"),
        numpy_helper.from_array(np.array(True), "always"),
        numpy_helper.from_array(np.array(0, np.float32), "zero_point"),
        *initializers,
    )


def build_greedy() -> bytes:
    """Return a graph of a few bytes that asks for 64 GB."""
    return build_model(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
            helper.make_node("MatMul", [INPUT.name, "weight"], ["product"]),
            helper.make_node("Add", ["product", "sum"], [OUTPUT.name]),
        ],
        numpy_helper.from_array(np.array([1 << 34], np.int64), "shape"),
        numpy_helper.from_array(np.ones((FEATURES, 3), np.float32), "weight"),
    )


def build_external(location: str, **places: int) -> bytes:
    """Return a graph whose weight, 48 bytes, lies in another file; `offset` and `length` say where there."""
    weight = numpy_helper.from_array(np.ones((FEATURES, 3), np.float32), "weight")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    for key, value in places.items():
        weight.external_data.add(key=key, value=str(value))
    return build_model([helper.make_node("MatMul", [INPUT.name, "weight"], [OUTPUT.name])], weight)


def build_foreign() -> bytes:
    return build_model([helper.make_node("Steal", [INPUT.name], [OUTPUT.name], domain="evil")], domain="evil")
