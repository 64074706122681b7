from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fl_server.errors import DefinitionError, UsageError
from fl_server.packaging.imported import load_imported, make_up_inputs, package_imported
from models.contract.encoding import build_digest
from models.contract.golden import parse_golden
from models.contract.manifest import parse_manifest
from models.tensors.spec import TensorSpec

DATA = Path(__file__).parents[2] / "data"


def save(path, nodes, inputs, outputs, *, initializers=(), opsets=(("", 18),), functions=()):
    """Write a graph; inputs and outputs are (name, element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*tensor) for tensor in inputs],
        [helper.make_tensor_value_info(*tensor) for tensor in outputs],
        list(initializers),
    )
    imports = [helper.make_opsetid(*opset) for opset in opsets]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))
    path.write_bytes(model.SerializeToString())
    return path


def save_dense(path, features=64, hidden=64, *, cancelling=False):
    """Write two layers; `cancelling` answers with small differences of large numbers, which int8 cannot hold."""
    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.normal(0, 0.2, (features, hidden)),
        "b1": generator.normal(0, 0.1, hidden),
        "w2": generator.normal(0, 0.2, (hidden, 3)),
        "b2": generator.normal(0, 0.1, 3),
    }
    if cancelling:
        weights["w1"][:, 0] *= 100
        weights["w1"][:, 1] += weights["w1"][:, 0]
        weights["w2"][:2] = [[-1] * 3, [1] * 3]
        weights["w2"][2:] = 0
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["scores"]),
    ]
    return save(
        path,
        nodes,
        [("x", TensorProto.FLOAT, ["n", features])],
        [("scores", TensorProto.FLOAT, ["n", 3])],
        initializers=[numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )


def package(path, out_dir, *, calibration=None, labels=(), said=None):
    return package_imported(
        load_imported(path),
        model="made",
        version=4,
        labels=labels,
        calibration=calibration,
        measure=lambda run: None,
        out_dir=out_dir,
        say=(said if said is not None else []).append,
    )


def test_graph_of_several_inputs_and_outputs_becomes_a_version_that_is_only_served(tmp_path):
    path = save(
        tmp_path / "several.onnx",
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Identity", ["name"], ["same"]),
            helper.make_node("Cast", ["a"], ["half"], to=TensorProto.FLOAT16),
        ],
        [
            ("a", TensorProto.FLOAT, ["n", 2]),
            ("b", TensorProto.FLOAT, ["n", 2]),
            ("name", TensorProto.STRING, [None, 1]),
        ],
        [
            ("sum", TensorProto.FLOAT, ["n", 2]),
            ("same", TensorProto.STRING, [None, 1]),
            ("half", TensorProto.FLOAT16, ["n", 2]),
        ],
    )
    manifest = package(path, tmp_path / "1", labels=("low", "high"))
    assert parse_manifest((tmp_path / "1/manifest.json").read_bytes()) == manifest
    assert [(spec.name, spec.shape, spec.dtype) for spec in (*manifest.inputs, *manifest.outputs)] == [
        ("a", ("batch", 2), "float32"),
        ("b", ("batch", 2), "float32"),
        ("name", ("batch", 1), "string"),
        ("sum", ("batch", 2), "float32"),
        ("same", ("batch", 1), "string"),
        ("half", ("batch", 2), "float16"),
    ]
    assert (manifest.version, manifest.runtime, manifest.training, manifest.measured) == (4, "onnx", None, None)
    assert sorted(file.name for file in (tmp_path / "1").iterdir()) == ["inference.onnx", "manifest.json"]
    assert (tmp_path / "1/inference.onnx").read_bytes() == path.read_bytes(), "what is not quantized is not touched"
    assert manifest.files["inference.onnx"].digest == build_digest(path.read_bytes())


def test_litert_graph_with_a_fixed_batch_of_one_is_accepted_and_answers_as_it_was_recorded(tmp_path):
    manifest = package(DATA / "tflite-version/inference.tflite", tmp_path / "1", labels=tuple("0123456789"))
    assert manifest.runtime == "tflite"
    assert manifest.inputs == (TensorSpec("image", ("batch", 1, 8, 8), "float32"),)
    assert manifest.outputs == (TensorSpec("logits", ("batch", 10), "float32"),)
    with np.load(DATA / "tflite-version.npz") as arrays:
        logits = load_imported(tmp_path / "1/inference.tflite").run({"image": arrays["image"]})["logits"]
        assert np.abs(logits - arrays["logits"]).max() < 0.05, "other processors round a step of int8 otherwise"


def test_calibration_makes_a_float_graph_int8_where_that_is_smaller(tmp_path):
    path = save_dense(tmp_path / "dense.onnx")
    x = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    manifest = package(path, tmp_path / "1", calibration={"x": x})
    assert parse_golden((tmp_path / "1/golden.bin").read_bytes(), manifest).outputs
    assert manifest.measured.packaged == "int8"
    assert manifest.files["inference.onnx"].size_bytes == manifest.measured.int8.size_bytes < path.stat().st_size / 2
    packaged, exact = (
        ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for file in (tmp_path / "1/inference.onnx", path)
    )
    assert 0 < np.abs(packaged - exact).mean() < 0.05 * exact.std()


def test_graph_that_int8_would_not_make_smaller_or_would_distort_stays_as_it_is(tmp_path):
    small = save_dense(tmp_path / "small.onnx", features=2, hidden=2)
    manifest = package(small, tmp_path / "small", calibration={"x": np.eye(2, dtype=np.float32)})
    assert manifest.measured.packaged == "float32"
    assert (tmp_path / "small/inference.onnx").read_bytes() == small.read_bytes()

    said = []
    delicate = save_dense(tmp_path / "delicate.onnx", cancelling=True)
    x = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    manifest = package(delicate, tmp_path / "delicate", calibration={"x": x}, said=said)
    assert manifest.measured.packaged == "float32"
    assert manifest.measured.int8.size_bytes < manifest.measured.float32.size_bytes
    assert said[0].startswith("kept in float32: int8 outputs stray by")
    assert (tmp_path / "delicate/inference.onnx").read_bytes() == delicate.read_bytes()


def make_custom(path):
    return save(
        path,
        [helper.make_node("Solve", ["x"], ["y"], domain="com.acme")],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
        opsets=[("", 18), ("com.acme", 1)],
    )


def make_custom_inside_a_branch(path):
    branch = helper.make_graph(
        [helper.make_node("Solve", ["x"], ["z"], domain="com.acme")],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 2])],
    )
    condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    return save(
        path,
        [condition, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
        opsets=[("", 18), ("com.acme", 1)],
    )


def make_other_runtime_operator(path):
    return save(
        path,
        [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
        opsets=[("", 18), ("com.microsoft", 1)],
    )


def make_external(path):
    save_dense(path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def make_external_constant(path):
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "one")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return save(
        path,
        [helper.make_node("Constant", [], ["one"], value=tensor), helper.make_node("Add", ["x", "one"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
    )


def make_fixed(path):
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, [1, 2])],
        [("y", TensorProto.FLOAT, [1, 2])],
    )


def make_free_axis(path):
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", "length"])],
        [("y", TensorProto.FLOAT, ["n", "length"])],
    )


def make_summed(path):
    return save(
        path,
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, [1, 1])],
    )


def make_not_finite(path):
    return save(
        path,
        [helper.make_node("Reciprocal", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
    )


def make_complex(path):
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.BFLOAT16, ["n", 2])],
        [("y", TensorProto.BFLOAT16, ["n", 2])],
    )


def make_broken_shapes(path):
    return save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
        initializers=[numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_custom, r"operator com\.acme\.Solve is custom"),
        (make_custom_inside_a_branch, r"operator com\.acme\.Solve is custom"),
        (make_other_runtime_operator, r"operator com\.microsoft\.Gelu is custom"),
        (make_external, "tensor 'w1' lies in another file"),
        (make_external_constant, "tensor 'one' lies in another file"),
        (make_fixed, r"input 'x' has shape \[1, 2\]: its first axis must be free"),
        (make_free_axis, r"input 'x' has rows of shape \['length'\]: only the batch may be free"),
        (make_summed, r"output 'y' has shape \(1, 1\) for 2 rows: its first axis is not the batch"),
        (make_not_finite, "output 'y' is not finite on zeros"),
        (make_complex, "bfloat16"),
        (make_broken_shapes, "does not load"),
        (lambda path: path.write_bytes(b"\x08\x99not a graph") and path, "it is no ONNX graph|does not load"),
        (lambda path: path.touch() or path, "0 bytes, a graph has 1 to"),
    ],
)
def test_graph_that_a_device_could_not_serve_is_refused_in_one_line(tmp_path, make, message):
    path = make(tmp_path / "graph.onnx")
    with pytest.raises(DefinitionError, match=message) as caught:
        load_imported(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_functions_that_the_file_defines_itself_are_no_custom_operators(tmp_path):
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    double = helper.make_function("made.here", "Double", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    path = save(
        tmp_path / "double.onnx",
        [helper.make_node("Double", ["x"], ["y"], domain="made.here")],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
        opsets=[("", 18), ("made.here", 1)],
        functions=[double],
    )
    assert load_imported(path).run({"x": np.ones((3, 2), np.float32)})["y"].tolist() == [[2, 2]] * 3


def test_tflite_file_that_litert_refuses_is_refused_in_one_line(tmp_path):
    path = tmp_path / "graph.tflite"
    path.write_bytes((DATA / "tflite-version/inference.tflite").read_bytes()[:500])
    with pytest.raises(DefinitionError, match="does not load"):
        load_imported(path)


def test_labels_must_fit_an_output_and_nothing_is_left_when_they_do_not(tmp_path):
    path = save_dense(tmp_path / "dense.onnx")
    with pytest.raises(UsageError, match=r"2 labels, but no output has a last axis of that length: scores"):
        package(path, tmp_path / "1", labels=("a", "b"))
    assert [file.name for file in tmp_path.iterdir()] == ["dense.onnx"]
    assert package(path, tmp_path / "1", labels=("a", "b", "c")).labels == ("a", "b", "c")
    with pytest.raises(UsageError, match="a version is immutable"):
        package(path, tmp_path / "1")


def test_made_up_inputs_have_the_dtype_of_every_tensor():
    specs = (TensorSpec("a", ("batch", 2), "string"), TensorSpec("b", ("batch",), "uint64"))
    made_up = make_up_inputs(specs, 3)
    assert made_up["a"].tolist() == [["", ""]] * 3
    assert (made_up["b"].dtype, made_up["b"].tolist()) == (np.uint64, [0, 0, 0])
