from decimal import Decimal

import numpy as np
import pytest
from onnx import TensorProto, helper

from fl_server.evaluation.evaluate import Evaluator, measure_quality
from models.contract.manifest import TrainingContract
from models.tensors.layout import Layout
from models.tensors.spec import TensorSpec

TRAINING = TrainingContract(
    layout=Layout(names=("weight",), shapes=((2, 1),)),
    batch=4,
    target=TensorSpec("y", ("batch",), "float32"),
    metric="rmse",
)
X = np.random.default_rng(0).normal(size=(11, 2)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=11).astype(np.float32)
WEIGHT = np.array([[0.5], [-2]], np.float32)


def save(path, nodes, inputs, outputs):
    tensors = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(helper.make_graph(nodes, "graph", *tensors), opset_imports=[opset], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def graph_path(tmp_path):
    """Masked squared error of a linear model, in batches of four."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "weight"], ["output"]),
        node("Squeeze", ["output"], ["flat"]),
        node("Sub", ["flat", "y"], ["difference"]),
        node("Mul", ["difference", "difference"], ["squared"]),
        node("Mul", ["squared", "mask"], ["masked"]),
        node("ReduceSum", ["masked"], ["loss"], keepdims=0),
    ]
    inputs = {"x": [4, 2], "y": [4], "mask": [4], "weight": [2, 1]}
    return save(tmp_path / "evaluate.onnx", nodes, inputs, {"loss": [], "output": [4, 1]})


def test_last_batch_is_padded_and_its_padding_counts_for_nothing(graph_path):
    error = X @ WEIGHT[:, 0] - Y
    for rows in (1, 4, 11):
        found = Evaluator(graph_path, TRAINING, "rmse").evaluate({"weight": WEIGHT}, X[:rows], Y[:rows])
        assert found.samples == rows
        assert found.loss == pytest.approx(float(np.mean(error[:rows] ** 2)), rel=1e-5)
        assert found.value == pytest.approx(float(np.sqrt(np.mean(error[:rows] ** 2))), rel=1e-5)


def test_evaluator_serves_round_after_round_and_any_metric(graph_path):
    evaluator = Evaluator(graph_path, TRAINING, lambda output, target: float(output.shape == (11, 1)) + len(target))
    assert evaluator.evaluate({"weight": WEIGHT}, X, Y).value == 12
    zero = evaluator.evaluate({"weight": np.zeros_like(WEIGHT)}, X, Y[:, None].astype(np.float64))
    assert zero.loss == pytest.approx(float(np.mean(Y**2)), rel=1e-5)


@pytest.mark.parametrize(("x", "y"), [(X[:0], Y[:0]), (X, Y[:3])])
def test_evaluation_without_samples_or_targets_is_refused(graph_path, x, y):
    with pytest.raises(ValueError, match="evaluation needs samples, as many x"):
        Evaluator(graph_path, TRAINING, "rmse").evaluate({"weight": WEIGHT}, x, y)


def test_quality_says_what_packaging_cost(tmp_path):
    def scaled(name, factor):
        constant = helper.make_node("Constant", [], ["factor"], value_float=factor)
        multiply = helper.make_node("Mul", ["features", "factor"], ["logits"])
        return save(tmp_path / name, [constant, multiply], {"features": ["batch", 2]}, {"logits": ["batch", 2]})

    x = np.tile(np.array([[1, 2], [3, 1]], np.float32), (300, 1))
    y = np.tile([1, 1], 300)
    quality = measure_quality(scaled("packaged", -1.0), scaled("float", 1.0), x, y, "accuracy")
    assert (quality.metric, quality.samples) == ("accuracy", 600)
    assert (quality.value, quality.float_value) == (Decimal("0.5"), Decimal("0.5"))
    assert quality.logit_deviation == Decimal("3.5")
