"""A hostile version ends in a child: the caller gets one line and lives."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import StalledError
from edge_agent.inference.sandbox import try_in_sandbox
from tests.simulators.tiny_models import FEATURES, INPUT, OUTPUT, build_graph, save_version


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


def build_endless() -> bytes:
    """Return a graph that counts to 2 ** 62 before it answers."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["condition_in"], ["condition_out"]),
            helper.make_node("Sin", ["carried_in"], ["carried_out"]),
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
    )
    return build_model(
        [
            helper.make_node("MatMul", [INPUT.name, "weight"], ["start"]),
            helper.make_node("Loop", ["trips", "always", "start"], [OUTPUT.name], body=body),
        ],
        numpy_helper.from_array(np.ones((FEATURES, 3), np.float32), "weight"),
        numpy_helper.from_array(np.array(2**62, np.int64), "trips"),
        numpy_helper.from_array(np.array(True), "always"),
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


def build_external(location: str) -> bytes:
    """Return a graph whose weight lies in another file."""
    weight = numpy_helper.from_array(np.ones((FEATURES, 3), np.float32), "weight")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return build_model([helper.make_node("MatMul", [INPUT.name, "weight"], [OUTPUT.name])], weight)


def build_foreign() -> bytes:
    return build_model([helper.make_node("Steal", [INPUT.name], [OUTPUT.name], domain="evil")], domain="evil")


@pytest.mark.parametrize(
    "build",
    [
        build_greedy,
        build_foreign,
        lambda: build_external("/etc/hostname"),
        lambda: build_external("../secret.bin"),
        lambda: build_graph(1).SerializeToString()[:-20],
        lambda: b"no graph",
    ],
    ids=["64 GB", "custom operator", "absolute path", "path above", "truncated", "junk"],
)
def test_hostile_graph_is_refused_in_one_line(tmp_path: Path, build: Callable[[], bytes]) -> None:
    save_version(tmp_path / "v", graph=build())
    with pytest.raises(StalledError) as refused:
        try_in_sandbox(tmp_path / "v")
    assert str(refused.value)
    assert "\n" not in str(refused.value)


def test_hard_linked_external_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(np.ones((FEATURES, 3), np.float32).tobytes())
    save_version(tmp_path / "v", graph=build_external("weights.data"))
    os.link(tmp_path / "secret.bin", tmp_path / "v" / "weights.data")
    with pytest.raises(StalledError):
        try_in_sandbox(tmp_path / "v")


def test_graph_without_end_is_ended(tmp_path: Path) -> None:
    save_version(tmp_path / "v", graph=build_endless())
    with pytest.raises(StalledError, match="within 4 s"):
        try_in_sandbox(tmp_path / "v", deadline_s=4.0)


def test_good_version_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_version(tmp_path / "v")
    before = sorted(path.name for path in (tmp_path / "v").iterdir())
    try_in_sandbox(tmp_path / "v")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == before
