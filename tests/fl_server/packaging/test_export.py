from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_server.errors import DefinitionError, UsageError
from fl_server.packaging.architecture import load_architecture, load_parameters
from fl_server.packaging.export import export_architecture
from fl_server.packaging.graphs import build_with_parameters, load_graph, save_graph
from models.definitions import ModelDefinition, TensorSpec


def define(build, shape=(4,), **others):
    settings = {"loss": "cross_entropy", "metric": "accuracy", "batch": 4} | others
    inputs = (TensorSpec("features", ("batch", *shape), "float32"),)
    return ModelDefinition(
        name="mine", build=build, inputs=inputs, outputs=(TensorSpec("logits", ("batch", 2), "float32"),), **settings
    )


class NeverCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x + torch.rand_like(x))


class Branches(nn.Module):
    """What a sample goes through depends on its values."""

    def __init__(self):
        super().__init__()
        self.one_of = nn.Bilinear(4, 4, 2)

    def forward(self, x):
        return torch.cat([self.one_of(row, row) if row.sum() > 0 else self.one_of(row, -row) for row in x.split(1)])


class MixesSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x - x.mean(0))


def frozen():
    module = nn.Linear(4, 2)
    module.bias.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (define(NeverCalled), r"spare\.weight: the loss does not depend on it; remove its layer"),
        (define(MixesSamples), r"output depends on the other samples .*; use nn\.GroupNorm or nn\.LayerNorm"),
        (define(Random), r"two runs on the same input differ: random parts"),
        (define(Branches), r"one_of \(Bilinear\) has no rule .*; and gradients sample by sample fail: RuntimeError"),
        (define(frozen), r"bias: does not require a gradient; register constants as buffers"),
        (define(nn.Flatten), r"no trainable layer; use nn\.Linear"),
        (
            define(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))),
            r"1 \(BatchNorm1d\): batch statistics mix samples; use nn\.GroupNorm",
        ),
        (define(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))), r"0 \(Dropout\): random layers"),
        (define(lambda: nn.LSTM(4, 2), (3, 4)), r"the module itself \(LSTM\) returns a tuple"),
        (define(lambda: nn.TransformerEncoderLayer(4, 2), (3, 4)), r"self_attn \(MultiheadAttention\): random layers"),
        (define(lambda: nn.Sequential(nn.Embedding(5, 2, max_norm=1.0))), r"0 \(Embedding\): leave out max_norm"),
        (define(lambda: nn.Linear(4, 2).double()), r"weight: is torch\.float64"),
        (define(lambda: nn.Linear(4, 3)), r"output 'logits' is .*\(4, 3\), the definition says .*\(4, 2\)"),
        (define(lambda: nn.Linear(5, 2)), r"does not run on its own inputs: RuntimeError: mat1 and mat2"),
        (define(lambda: 1 / 0), r"build\(\) failed: ZeroDivisionError"),
        (define(lambda: nn.Linear(4, 2), loss=functional.mse_loss), r"reduce by sum, not by mean"),
        (
            define(lambda: nn.Linear(4, 2), local=("bias", "haed.*")),
            r"local: 'haed\.\*' fits no parameter; there are weight, bias$",
        ),
        (define(lambda: nn.Linear(4, 2), local=("*",)), r"local: '\*' fit all parameters: none would be shared"),
    ],
    ids=lambda value: "" if isinstance(value, ModelDefinition) else value[:30],
)
def test_what_cannot_be_trained_privately_is_refused_by_name_and_leaves_nothing(definition, message, tmp_path):
    with pytest.raises(DefinitionError, match=message) as caught:
        export_architecture(definition, tmp_path / "mine")
    assert str(caught.value).startswith("mine: ")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Largest(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x).cummax(1).values


def test_operation_without_a_translation_is_named_in_one_line(tmp_path):
    with pytest.raises(DefinitionError, match=r"^mine: evaluate\.onnx cannot be exported: .*cummax") as caught:
        export_architecture(define(Largest), tmp_path / "mine")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_existing_export_is_not_overwritten(exports):
    mlp = exports("mlp")
    with pytest.raises(UsageError, match="exists: remove it to export mlp anew"):
        export_architecture(mlp.definition, mlp.architecture.directory)


def test_export_of_the_same_seed_gives_the_same_bytes(exports, tmp_path):
    mlp = exports("mlp")
    again = export_architecture(mlp.definition, tmp_path / "again", seed=1)
    for path in mlp.architecture.directory.iterdir():
        assert path.read_bytes() == (again.directory / path.name).read_bytes(), path.name


def test_initial_parameters_follow_the_seed(exports, tmp_path):
    mlp = exports("mlp")
    other = export_architecture(mlp.definition, tmp_path / "other", seed=2)
    assert other.train_step_path.read_bytes() == mlp.architecture.train_step_path.read_bytes()
    one, two = mlp.architecture.load_initial_parameters(), other.load_initial_parameters()
    assert not np.array_equal(one["0.weight"], two["0.weight"])


def test_float_graph_with_other_parameters_gives_what_torch_gives_for_any_batch(exported, tmp_path):
    parameters = exported.build_parameters(seed=11)
    graph = build_with_parameters(load_graph(exported.architecture.float_path), parameters)
    save_graph(graph, tmp_path / "changed.onnx")
    session = ort.InferenceSession(tmp_path / "changed.onnx", providers=["CPUExecutionProvider"])
    module = exported.definition.build().eval()
    module.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    x, _ = exported.build_data(seed=12)
    for rows in (1, 5, 8):
        (found,) = session.run(["logits"], {"features": x[:rows]})
        with torch.no_grad():
            np.testing.assert_allclose(found, module(torch.tensor(x[:rows])).numpy(), atol=1e-5)


def test_parameter_that_the_float_graph_lacks_is_not_lost_in_silence(exports):
    mlp = exports("mlp")
    graph = load_graph(mlp.architecture.float_path)
    parameters = mlp.build_parameters(0)
    with pytest.raises(DefinitionError, match=r"parameter '9\.weight' is not in the inference graph"):
        build_with_parameters(graph, parameters | {"9.weight": np.zeros(1, np.float32)})
    with pytest.raises(DefinitionError, match=r"parameter '0\.bias' has shape \(3,\), .* \(16,\)"):
        build_with_parameters(graph, parameters | {"0.bias": np.zeros(3, np.float32)})


def test_graphs_name_their_doors_and_hold_no_path_of_this_machine(exported):
    architecture = exported.architecture
    names = list(architecture.training.layout.names)
    step, evaluation = onnx.load(architecture.train_step_path), onnx.load(architecture.evaluate_path)
    assert [value.name for value in step.graph.input] == ["x", "y", "mask", "clipping_norm", *names]
    assert [value.name for value in step.graph.output] == [*(f"sum/{name}" for name in names), "norms"]
    assert [value.name for value in evaluation.graph.input] == ["x", "y", "mask", *names]
    assert [value.name for value in evaluation.graph.output] == ["loss", "output"]
    for path in architecture.directory.glob("*.onnx"):
        assert b"packaging" not in path.read_bytes()
        assert {opset.domain for opset in onnx.load(path).opset_import} <= {"", "ai.onnx"}


def test_architecture_reads_back_as_it_was_exported(exports):
    text = exports("text")
    architecture = load_architecture(text.architecture.directory)
    assert architecture == text.architecture
    assert architecture.quantization == "dynamic"
    assert architecture.training.target == TensorSpec("y", ("batch",), "int64")
    assert exports("cnn").architecture.training.target == TensorSpec("y", ("batch",), "float32")
    assert exports("sequence").architecture.training.target == TensorSpec("y", ("batch", 2), "float32")


def test_missing_or_foreign_architecture_is_a_usage_error(exports, tmp_path):
    with pytest.raises(UsageError, match="holds no exported architecture"):
        load_architecture(tmp_path)
    mlp, text = exports("mlp").architecture, exports("text").architecture
    with pytest.raises(UsageError, match=r"parameters .* are not"):
        load_parameters(mlp.directory / "initial.safetensors", text.training.layout)
    with pytest.raises(UsageError, match=r"architecture\.json"):
        load_parameters(mlp.directory / "architecture.json", mlp.training.layout)


def test_custom_metric_and_loss_are_named_and_typed_by_the_definition(tmp_path):
    def share_right(output, target):
        return float((output.argmax(1) == target).mean())

    definition = define(
        lambda: nn.Linear(4, 2),
        loss=lambda output, target: functional.cross_entropy(output, target, reduction="sum"),
        metric=share_right,
        labels=("no", "yes"),
    )
    training = export_architecture(replace(definition, name="own"), tmp_path / "own").training
    assert training.metric == "share_right"
    assert training.target == TensorSpec("y", ("batch",), "int64")
