import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import nn

from fl_server.packaging.layers import Use, embedding_gradient, linear_gradient
from models.definitions.losses import build_sample_losses


def opacus_step(exported, x, y, clipping_norm, parameters):
    """Return the clipped sums and the norms that Opacus's per-sample gradients give, in float64."""
    module = copy.deepcopy(exported.definition.build())
    module.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    sampled = GradSampleModule(module, loss_reduction="sum")
    build_sample_losses(exported.definition)(sampled(torch.tensor(x)), torch.tensor(y)).sum().backward()
    gradients = {name: p.grad_sample.double().numpy() for name, p in module.named_parameters()}
    flat = np.concatenate([g.reshape(len(x), -1) for g in gradients.values()], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    factor = np.minimum(1, clipping_norm / np.maximum(norms, 1e-30))
    return {name: np.tensordot(factor, g, 1) for name, g in gradients.items()}, norms


def length(sums):
    return float(np.linalg.norm(np.concatenate([value.ravel().astype(np.float64) for value in sums.values()])))


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("clipping", [0.3, 1e3], ids=["most samples clipped", "none clipped"])
def test_step_graph_gives_the_clipped_sums_and_norms_of_opacus_for_the_samples_of_a_partial_mask(exported, clipping):
    parameters = exported.build_parameters(seed=2)
    x, y = exported.build_data(seed=3)
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
    sums, norms = exported.run_step(x, y, mask, clipping, parameters)
    expected, expected_norms = opacus_step(exported, x[mask], y[mask], clipping, parameters)
    assert {name: value.shape for name, value in sums.items()} == {n: v.shape for n, v in parameters.items()}
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5 * max(1, np.abs(expected[name]).max()))
    np.testing.assert_allclose(norms[mask], expected_norms, rtol=1e-5)
    assert not norms[~mask].any()


def test_rows_without_mask_contribute_exactly_nothing_whatever_they_hold(exported):
    parameters = exported.build_parameters(seed=4)
    x, y = exported.build_data(seed=5)
    mask = np.array([1, 0, 1, 1, 0, 0, 0, 1], bool)
    sums, norms = exported.run_step(x, y, mask, 0.5, parameters)
    x[~mask], y[~mask] = 0, 0
    blank_sums, blank_norms = exported.run_step(x, y, mask, 0.5, parameters)
    assert all(np.array_equal(sums[name], blank_sums[name]) for name in sums)
    assert np.array_equal(norms, blank_norms)
    nothing, no_norms = exported.run_step(x, y, np.zeros(8), 0.5, parameters)
    assert not any(value.any() for value in nothing.values())
    assert not no_norms.any()


@given(
    seed=st.integers(0, 2**16),
    row=st.integers(0, 7),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    clipping_norm=st.floats(1e-4, 1e4),
    weight=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_one_sample_never_moves_the_sum_by_more_than_the_clipping_norm(
    exported, seed, row, scale, clipping_norm, weight
):
    x, y = exported.build_data(seed, scale)
    mask = np.zeros(8)
    mask[row] = weight  # a mask is yes or no: it cannot count a sample more than once
    sums, norms = exported.run_step(x, y, mask, clipping_norm, exported.build_parameters(seed))
    assert length(sums) <= clipping_norm * (1 + 1e-6)
    assert length(sums) >= min(clipping_norm, norms[row]) * (1 - 1e-4) - 1e-6


@given(seed=st.integers(0, 2**16), clipping_norm=st.floats(1e-2, 1e2))
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_sum_over_a_batch_is_the_sum_over_its_samples(exported, seed, clipping_norm):
    x, y = exported.build_data(seed)
    parameters = exported.build_parameters(seed)
    together, _ = exported.run_step(x, y, np.ones(8), clipping_norm, parameters)
    alone = [exported.run_step(x, y, mask, clipping_norm, parameters)[0] for mask in np.eye(8)]
    for name, value in together.items():
        np.testing.assert_allclose(value, sum(part[name] for part in alone), rtol=1e-4, atol=1e-5 * clipping_norm)


def test_sample_without_gradient_adds_zeros_and_no_nan(exports):
    sequence = exports("sequence")
    parameters = {name: np.zeros_like(value) for name, value in sequence.build_parameters(0).items()}
    x, y = sequence.build_data(seed=6)
    sums, norms = sequence.run_step(x, np.zeros_like(y), np.ones(8), 1.0, parameters)
    assert norms.max() < 1e-12
    assert not any(value.any() for value in sums.values())


def test_norm_by_gram_matrices_is_not_understated_where_positions_cancel():
    generator = torch.Generator().manual_seed(7)
    layer = nn.Linear(64, 64, bias=False)
    for gap in (1e-2, 1e-3, 1e-4, 1e-5, 0.0):
        inputs = torch.randn(1, 1, 64, generator=generator).repeat(1, 2, 1)
        gradients = torch.randn(1, 1, 64, generator=generator).repeat(1, 2, 1)
        gradients[:, 1] *= -(1 + gap)
        kept = linear_gradient(layer, [Use(inputs, gradients)])
        true_norm = kept.clipped_sums(torch.ones(1))["weight"].double().norm()
        assert float(kept.squared_norms.double().sqrt()) >= float(true_norm) * (1 - 1e-6)


@pytest.mark.parametrize("build", [lambda: torch.full((2, 1, 64), 1e-23), lambda: torch.full((2, 64), 1e-23)])
def test_inputs_whose_squares_vanish_do_not_hide_a_gradient(build):
    inputs = build()
    gradients = torch.full((*inputs.shape[:-1], 64), 1e17)
    gradient = linear_gradient(nn.Linear(64, 64, bias=False), [Use(inputs, gradients)])
    exact = 64 * 1e-23 * 1e17
    assert (gradient.squared_norms.sqrt() >= exact).all()


def test_negative_tokens_name_the_same_rows_for_norm_and_sum(exports):
    text = exports("text")
    x, y = text.build_data(seed=12)
    negative = np.where(np.arange(7) % 2, x - 20, x)  # onnxruntime counts these from the end of the 20 rows
    parameters = text.build_parameters(seed=13)
    sums, norms = text.run_step(negative, y, np.ones(8), 1e-3, parameters)
    expected, expected_norms = text.run_step(x, y, np.ones(8), 1e-3, parameters)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-8)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    of_input=st.floats(-25, 25),
    spread=st.sampled_from([0, 8]),
    of_target=st.floats(-20, 20),
    of_parameters=st.sampled_from([-1, 3, 10, 15]),
)
def test_values_of_any_size_never_let_a_sample_exceed_the_clipping_norm(
    exported, seed, of_input, spread, of_target, of_parameters
):
    """All powers of ten; what comes out as no number is refused by the device."""
    x, y = exported.build_data(seed)
    generator = np.random.default_rng(seed)
    if x.dtype == np.float32:
        exponents = np.clip(of_input + spread * generator.uniform(-1, 1, x.shape), -40, 38)
        x = (x.clip(-3, 3) * 10.0**exponents).astype(np.float32)
    if exported.definition.loss == "mse":
        y = (y * 10.0**of_target).astype(np.float32)
    parameters = {
        name: (value * 10.0**of_parameters).astype(np.float32)
        for name, value in exported.build_parameters(seed).items()
    }
    sums, _ = exported.run_step(x, y, np.arange(8) == 0, 0.1, parameters)
    total = np.concatenate([value.ravel() for value in sums.values()]).astype(np.float64)
    assert not np.isfinite(total).all() or np.linalg.norm(total) <= 0.1 * (1 + 1e-4)


def test_padding_token_of_an_embedding_has_no_gradient_as_in_torch():
    layer = nn.Embedding(5, 3, padding_idx=0)
    tokens, gradients = torch.tensor([[0, 2, 2], [4, 0, 1]]), torch.randn(2, 3, 3)
    kept = embedding_gradient(layer, [Use(tokens, gradients)])
    for row in range(2):
        (expected,) = torch.autograd.grad((layer(tokens[row]) * gradients[row]).sum(), layer.weight)
        found = kept.clipped_sums(torch.eye(2)[row])["weight"]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(kept.squared_norms[row].sqrt(), expected.norm())
        assert not found[0].any()


def test_loss_of_the_evaluation_graph_is_the_sum_over_the_mask_and_its_output_that_of_torch(exported):
    parameters = exported.build_parameters(seed=8)
    x, y = exported.build_data(seed=9)
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 1], np.float32)
    session = ort.InferenceSession(exported.architecture.evaluate_path, providers=["CPUExecutionProvider"])
    loss, output = session.run(["loss", "output"], {"x": x, "y": y, "mask": mask, **parameters})
    module = exported.definition.build()
    module.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    with torch.no_grad():
        expected = module(torch.tensor(x))
        losses = build_sample_losses(exported.definition)(expected, torch.tensor(y)).numpy()
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(loss, (losses * mask).sum(), rtol=1e-5)
