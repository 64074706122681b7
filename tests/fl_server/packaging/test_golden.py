"""Golden samples that a graph cannot answer twice are none."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fl_server.packaging.golden import write_golden
from models.tensors.spec import TensorSpec


@pytest.mark.parametrize(("x", "is_written"), [(1.0, True), (-1.0, False), (0.0, False)])
def test_samples_that_the_graph_does_not_answer_with_finite_numbers_are_not_written(tmp_path, x, is_written):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Log", ["x"], ["y"])], "log", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path := tmp_path / "inference.onnx")
    data = {"x": np.array([[x, 2.0]], np.float32)}
    entry = write_golden(path, data, inputs=(TensorSpec("x", ("batch", 2), "float32"),), tolerance=0.1)
    assert (entry is not None, (tmp_path / "golden.bin").exists()) == (is_written, is_written)
