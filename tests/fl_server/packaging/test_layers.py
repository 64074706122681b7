"""Every layer, loss and way of use: the steps of both engines, derived and Opacus's, against autograd and each other."""

import copy
import math
import re

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_server.errors import DefinitionError
from fl_server.packaging.decompositions import DECOMPOSITIONS
from fl_server.packaging.export import export_architecture
from fl_server.packaging.per_sample import build_per_sample_step
from fl_server.packaging.source import check_opacus_step, load_source
from fl_server.packaging.training_step import derive_training_step
from models.definitions import ModelDefinition, TensorSpec
from models.definitions.losses import build_sample_losses, build_target_spec
from models.definitions.opacus_step import build_opacus_step

ROWS = 5


class Around(nn.Module):
    """A layer between two Linear ones, so that its input has a gradient too; `flow` says how it is called."""

    def __init__(self, layer, width, flow=None):
        super().__init__()
        self.scale, self.layer, self.head = nn.Linear(1, 1), layer, nn.Linear(width, 2)
        self.flow = flow or (lambda layer, x: layer(x))

    def forward(self, x):
        out = self.flow(self.layer, self.scale(x[..., None])[..., 0])
        return self.head(torch.tanh(out).flatten(1))


class Tokens(nn.Module):
    def __init__(self, embedding, uses=1):
        super().__init__()
        self.embedding, self.head, self.uses = embedding, nn.Linear(4, 2), uses

    def forward(self, tokens):
        found = self.embedding(tokens)
        if self.uses > 1:
            found = torch.tanh(found) * self.embedding(tokens.flip(1))
        return self.head(found.mean(1))


class Reused(nn.Module):
    """A Linear, a Conv1d and a LayerNorm, each used twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.norm = nn.Linear(6, 6), nn.Conv1d(3, 3, 3, padding=1), nn.LayerNorm(6)
        self.head = nn.Linear(18, 2)

    def forward(self, x):
        x = self.norm(torch.tanh(self.linear(torch.tanh(self.linear(x)))))
        return self.head(self.norm(self.conv(torch.relu(self.conv(x)))).flatten(1))


class ReusedRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.linear(torch.tanh(self.linear(x)))))


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(x * self.scale)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


class BehindTheHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(functional.linear(torch.tanh(self.inner(x)), self.inner.weight))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.reshape(-1, 3, 2).transpose(0, 1))).mean(0))


class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 18), nn.Linear(6, 2)

    def forward(self, x):
        query, key, value = (part[:, None] for part in self.mix(x).chunk(3, -1))
        return self.head(functional.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0].mean(1))


def last_state(layer, x):
    output, state = layer(x)
    cell = state[1] if isinstance(state, tuple) else state
    return output[:, -1] + cell.sum(0).repeat(1, output.shape[2] // cell.shape[2])


def cross_attention(layer, x):
    ahead = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    padding = torch.tensor([False, False, False, True]).expand(len(x), 4)
    return layer(x, x.flip(1), x * 2, attn_mask=ahead, key_padding_mask=padding)[0]


# By name: module, shape of a row.
BOOK_KEPT = {
    "rows": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)), (6,)),
    "short sequence": (lambda: Around(nn.Linear(16, 16), 32), (2, 16)),
    "long sequence": (lambda: Around(nn.Linear(3, 4), 36), (9, 3)),
    "images of rows": (lambda: Around(nn.Linear(3, 4, bias=False), 24), (2, 3, 3)),
    "Conv1d": (lambda: Around(nn.Conv1d(3, 4, 3), 24), (3, 8)),
    "Conv1d strided, dilated, grouped": (
        lambda: Around(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), 30),
        (4, 9),
    ),
    "Conv2d same": (lambda: Around(nn.Conv2d(2, 3, (2, 3), padding="same"), 60), (2, 4, 5)),
    "Conv2d valid, strided": (lambda: Around(nn.Conv2d(2, 4, 3, stride=(2, 1), padding="valid"), 24), (2, 6, 5)),
    "Conv2d dilated, depthwise": (lambda: Around(nn.Conv2d(3, 6, 3, dilation=2, padding=1, groups=3), 54), (3, 5, 5)),
    "Conv2d without bias, few positions": (lambda: Around(nn.Conv2d(6, 8, 3, bias=False), 8), (6, 3, 3)),
    "Embedding": (lambda: Tokens(nn.Embedding(9, 4)), "tokens"),
    "Embedding padded, used twice": (lambda: Tokens(nn.Embedding(9, 4, padding_idx=2), uses=2), "tokens"),
    "LayerNorm": (lambda: Around(nn.LayerNorm(6), 6), (6,)),
    "LayerNorm over two axes without bias": (lambda: Around(nn.LayerNorm((3, 4), bias=False), 24), (2, 3, 4)),
    "RMSNorm": (lambda: Around(nn.RMSNorm(5), 15), (3, 5)),
    "GroupNorm": (lambda: Around(nn.GroupNorm(2, 4), 36), (4, 3, 3)),
    "InstanceNorm1d": (lambda: Around(nn.InstanceNorm1d(3, affine=True), 15), (3, 5)),
    "InstanceNorm2d": (lambda: Around(nn.InstanceNorm2d(3, affine=True), 36), (3, 3, 4)),
    "layers used twice": (Reused, (3, 6)),
    "rows used twice": (ReusedRows, (6,)),
    "overlapping max pool": (lambda: Around(nn.Conv2d(1, 2, 3), 8, lambda c, x: functional.max_pool2d(c(x), 3, 2)), (1, 7, 7)),
    "max pool with a remainder": (
        lambda: Around(nn.Conv1d(1, 2, 2), 4, lambda c, x: functional.max_pool1d(c(x).relu(), 3)),
        (1, 9),
    ),
    "max pool of equals": (
        lambda: Around(nn.Conv2d(1, 2, 1), 8, lambda c, x: functional.max_pool2d(c(x).round(), 2) + c(x)[..., ::2, ::2]),
        (1, 4, 4),
    ),
    "GRU": (lambda: Around(nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True), 8, last_state), (3, 3)),
    "LSTM": (lambda: Around(nn.LSTM(3, 4, batch_first=True), 4, last_state), (4, 3)),
    "RNN without bias": (lambda: Around(nn.RNN(3, 4, bias=False, batch_first=True), 4, last_state), (4, 3)),
    "MultiheadAttention": (
        lambda: Around(nn.MultiheadAttention(6, 2, batch_first=True), 24, cross_attention),
        (4, 6),
    ),
    "TransformerEncoderLayer": (
        lambda: Around(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 12),
        (3, 4),
    ),
    "scaled dot product": (ScaledDotProduct, (3, 6)),
}  # fmt: skip
PER_SAMPLE = {
    "parameter of its own": (OwnParameter, (6,), r"the module itself \(OwnParameter\) has no rule"),
    "tied": (Tied, (6,), r"second\.weight shares its values with first\.weight"),
    "behind the hook": (BehindTheHook, (6,), r"inner\.weight: its clipped gradient differs"),
    "time first": (TimeFirst, (6,), r"inner \(Linear\): .*first axis is not the 5 samples"),
    "PReLU": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 2)), (6,), r"1 \(PReLU\)"),
    "reflected Conv2d": (
        lambda: Around(nn.Conv2d(2, 2, 3, padding=1, stride=2, padding_mode="reflect", groups=2), 8),
        (2, 4, 4),
        r"layer \(Conv2d\): padding_mode is 'reflect'",
    ),
    "ConvTranspose2d": (
        lambda: Around(nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2), 144),
        (2, 2, 2),
        r"layer \(ConvTranspose2d\)",
    ),
    "weights of a bias of keys": (
        lambda: Around(nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True), 18, lambda a, x: a(x, x, x)[0]),
        (3, 6),
        r"\(MultiheadAttention\) has no rule",
    ),
}


BEYOND_OPACUS = ("behind the hook", "time first", "weights of a bias of keys")  # whose hooks see layers only


def define(build, shape, **others):
    spec = (
        TensorSpec("x", ("batch", 7), "int64") if shape == "tokens" else TensorSpec("x", ("batch", *shape), "float32")
    )
    values = {"loss": "cross_entropy", "metric": "accuracy", "batch": ROWS} | others
    outputs = (TensorSpec("logits", ("batch", 2), "float32"),)
    return ModelDefinition(name="mine", build=build, inputs=(spec,), outputs=values.pop("outputs", outputs), **values)


def build_data(definition, seed):
    generator = torch.Generator().manual_seed(seed)
    spec, target = definition.inputs[0], build_target_spec(definition)

    def draw(spec, high):
        shape = (ROWS, *spec.row_shape)
        if spec.dtype == "int64":
            return torch.randint(0, high, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    y = draw(target, 2)
    return draw(spec, 9), (y > 0).float() if definition.loss == "bce_with_logits" else y


def build_parameters(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(value.shape, generator=generator) for name, value in module.named_parameters()}


def derive(definition, seed=0):
    torch.backends.mha.set_fastpath_enabled(value=False)
    module = definition.build().eval()
    losses = build_sample_losses(definition)
    step, reason = derive_training_step(module, losses, *build_data(definition, seed), build_parameters(module, seed))
    return module, losses, step, reason


def reference_gradients(module, losses, x, y, parameters):
    """Return each sample's gradients in float64, by one backward pass a sample."""
    module = copy.deepcopy(module).double()
    leaves = {name: value.double().requires_grad_() for name, value in parameters.items()}
    x, y = (array.double() if array.is_floating_point() else array for array in (x, y))
    rows = []
    for i in range(len(x)):
        loss = losses(functional_call(module, leaves, (x[i : i + 1],)), y[i : i + 1]).sum()
        rows.append(torch.autograd.grad(loss, list(leaves.values())))
    return {name: torch.stack(parts) for name, parts in zip(leaves, zip(*rows, strict=True), strict=True)}


def clip(gradients, clipping_norm):
    norms = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
    factor = torch.clamp(clipping_norm / norms.clamp(min=1e-30), max=1)
    return [torch.tensordot(factor, g, 1) for g in gradients.values()], norms


def assert_equal(outputs, gradients, clipping_norm):
    *sums, norms = (torch.as_tensor(np.asarray(value)).double() for value in outputs)
    expected, expected_norms = clip({name: g.double() for name, g in gradients.items()}, clipping_norm)
    scale = max(1.0, *(float(value.abs().max()) for value in expected))
    for name, value, wanted in zip(gradients, sums, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=1e-5)


def assert_same(one, other):
    scale = max(1.0, *(float(value.abs().max()) for value in one))
    for value, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * scale)


def check_derived(module, losses, step, definition, *, with_opacus=True):
    """The step, as it is, as it is traced for ONNX, and by Opacus: all give the clipped sums of the reference."""
    by_opacus = build_opacus_step(module, losses)
    ones = torch.ones(ROWS)
    with sdpa_kernel(SDPBackend.MATH):
        example = (*build_data(definition, 0), ones, torch.tensor(1.0), *build_parameters(module, 0).values())
        traced = make_fx(step, decomposition_table=DECOMPOSITIONS)(*example)

    @settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a smaller seed explains nothing
    )
    @given(seed=st.integers(1, 2**16), clipping_norm=st.sampled_from([0.3, 2.0, 1e3]))
    def check(seed, clipping_norm):
        x, y = build_data(definition, seed)
        parameters = build_parameters(module, seed)
        gradients = reference_gradients(module, losses, x, y, parameters)
        feeds = (x, y, ones, torch.tensor(clipping_norm), *parameters.values())
        assert_equal(step(*feeds), gradients, clipping_norm)
        assert_equal(traced(*feeds), gradients, clipping_norm)
        if with_opacus:
            assert_equal(by_opacus(*feeds), gradients, clipping_norm)
            assert_same(by_opacus(*feeds), traced(*feeds))

    check()


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", BOOK_KEPT)
def test_book_keeping_of_every_layer_and_opacus_give_the_clipped_sums_of_autograd(name):
    definition = define(*BOOK_KEPT[name])
    module, losses, step, reason = derive(definition)
    assert reason is None
    check_derived(module, losses, step, definition)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_what_layers_do_not_show_is_derived_sample_by_sample_and_said(name, caplog):
    build, shape, expected_reason = PER_SAMPLE[name]
    definition = define(build, shape)
    module, losses, step, reason = derive(definition)
    assert re.search(expected_reason, reason)
    assert "one gradient a sample, which is slower than book-keeping" in caplog.text
    check_derived(module, losses, step, definition, with_opacus=name not in BEYOND_OPACUS)


@pytest.mark.parametrize("name", BEYOND_OPACUS)
def test_what_opacus_takes_no_gradient_of_each_sample_of_is_refused(name):
    build, shape, _ = PER_SAMPLE[name]
    with pytest.raises(DefinitionError, match=r"differs from one backward pass|Opacus has no gradients of each sample"):
        check_opacus_step(load_source(define(build, shape)))


@pytest.mark.parametrize(
    "name", ["rows", "short sequence", "Conv2d same", "Embedding", "GroupNorm", "layers used twice"]
)
def test_one_gradient_a_sample_and_book_keeping_give_the_same_step(name):
    definition = define(*BOOK_KEPT[name])
    module, losses, step, _ = derive(definition)
    x, y = build_data(definition, 3)
    feeds = (x, y, torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor(0.7), *build_parameters(module, 3).values())
    for one, other in zip(step(*feeds), build_per_sample_step(module, losses)(*feeds), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def squared_sum(output, y):
    return ((output - functional.one_hot(y, 2)) ** 2).sum()


def numbers(*shape):
    return (TensorSpec("numbers", ("batch", *shape), "float32"),)


LOSSES = {
    "cross_entropy": define(lambda: nn.Linear(6, 2), (6,)),
    "cross_entropy of a sequence": define(
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 1)), (6,), outputs=numbers(2, 3)
    ),
    "mse": define(lambda: nn.Linear(6, 2), (6,), loss="mse", outputs=numbers(2)),
    "mse of one number": define(lambda: nn.Linear(6, 1), (6,), loss="mse", outputs=numbers(1)),
    "bce_with_logits": define(lambda: nn.Linear(6, 1), (6,), loss="bce_with_logits", outputs=numbers(1)),
    "bce_with_logits of many": define(lambda: nn.Linear(6, 3), (6,), loss="bce_with_logits", outputs=numbers(3)),
    "a function": define(lambda: nn.Linear(6, 2), (6,), loss=squared_sum, labels=("no", "yes")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_the_clipped_sums_of_autograd_by_both_engines(name):
    definition = LOSSES[name]
    module, losses, step, reason = derive(definition)
    assert reason is None
    check_derived(module, losses, step, definition)


class Everything(nn.Module):
    """Layers that no other exported definition holds, one behind the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), nn.GroupNorm(2, 6)
        self.instance, self.rms = nn.InstanceNorm1d(6, affine=True), nn.RMSNorm(4)
        self.twice, self.encoder = nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.gru, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        rows = functional.max_pool1d(torch.tanh(self.group(self.conv(x))), 2)
        rows = self.twice(torch.tanh(self.twice(torch.tanh(self.instance(rows))))) + self.rms(rows)
        return self.head(self.gru(self.encoder(rows)[:, :2])[0][:, -1])


class General(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")
        self.up, self.scale = nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Parameter(torch.ones(2, 1, 1))
        self.lstm, self.head = nn.LSTM(32, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        images = self.up(functional.max_pool2d(self.conv(x[..., None].expand(-1, -1, -1, 2)).relu(), 2)) * self.scale
        return self.head(self.lstm(images.flatten(2))[0][:, -1])


@pytest.mark.parametrize("build", [Everything, General])
def test_exported_step_of_the_rarer_layers_gives_what_autograd_does(build, tmp_path):
    definition = define(build, (4, 16))
    architecture = export_architecture(definition, tmp_path / "mine")
    module, losses = definition.build().eval(), build_sample_losses(definition)
    x, y = build_data(definition, 4)
    parameters = build_parameters(module, 4)
    session = ort.InferenceSession(architecture.train_step_path, providers=["CPUExecutionProvider"])
    arrays = {"x": x, "y": y, "mask": torch.ones(ROWS), "clipping_norm": torch.tensor(0.7), **parameters}
    outputs = session.run(None, {name: value.numpy() for name, value in arrays.items()})
    assert_equal(outputs, reference_gradients(module, losses, x, y, parameters), 0.7)
    assert math.isfinite(float(np.sum(outputs[-1])))
