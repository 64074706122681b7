"""The DP-SGD step of a plain nn.Module by Opacus's hooks: one gradient a sample, as large as the module each."""

import copy
import warnings

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from models.definitions.losses import SampleLosses
from models.definitions.substitutes import Step, build_substituted, restore_parameters


def build_opacus_step(module: nn.Module, sample_losses: SampleLosses) -> Step:
    """Return the function (x, y, mask, clipping_norm, *parameters) -> (*sums, norms) of `module`.

    It takes and returns what a train step graph does, and raises whatever torch and Opacus do; RuntimeError where
    Opacus has no gradient of each sample.
    """
    substituted, parts = build_substituted(module)
    template = copy.deepcopy(substituted).train()  # only then do the hooks look
    for layer in template.modules():
        if _is_misjudged(layer):  # Opacus goes by the exact type: for one that it does not know it asks vmap
            layer.__class__ = type(type(layer).__name__, (type(layer),), {})

    def step(x: Tensor, y: Tensor, mask: Tensor, clipping_norm: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return _sum_clipped(_take_gradients(template, sample_losses, x, y, values), mask, clipping_norm)

    return restore_parameters(step, substituted, parts)


def _is_misjudged(layer: nn.Module) -> bool:
    """Return whether Opacus's own rule for `layer` fails, or overlooks how it is padded."""
    if isinstance(layer, nn.LayerNorm):
        return layer.weight is not None and layer.bias is None
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is not None
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros"


def _take_gradients(
    template: nn.Module, sample_losses: SampleLosses, x: Tensor, y: Tensor, values: tuple[Tensor, ...]
) -> list[Tensor]:
    """Return the gradients of each sample by parameter, each of shape (n, ...)."""
    # A copy each time: what Opacus keeps of a batch that failed half way would be added to the next.
    module = copy.deepcopy(template)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)
    # Not strict: that refuses constant buffers, too; whether samples are mixed is measured.
    sampled = GradSampleModule(module, loss_reduction="sum", strict=False)
    with warnings.catch_warnings(), torch.enable_grad():
        for harmless in ("Full backward hook is firing", "In CPU autocast"):  # as in each step without float inputs
            warnings.filterwarnings("ignore", harmless)
        torch.autograd.backward(sample_losses(sampled(x), y).sum())
    gradients = []
    for name, parameter in module.named_parameters():
        found = getattr(parameter, "grad_sample", None)
        if not isinstance(found, Tensor) or len(found) != len(x):
            raise RuntimeError(f"Opacus has no gradient of each sample for {name}")
        gradients.append(found)
    return gradients


def _sum_clipped(gradients: list[Tensor], mask: Tensor, clipping_norm: Tensor) -> tuple[Tensor, ...]:
    lengths = [torch.linalg.vector_norm(found.flatten(1), dim=1, dtype=torch.float64) for found in gradients]
    norms = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
    zeros, is_real = torch.zeros_like(norms), mask > 0
    # By comparison, in which a norm that is not a number stays one.
    factor = torch.where(norms <= clipping_norm, torch.ones_like(norms), clipping_norm / norms)
    factor = torch.where(is_real, factor, zeros)
    sums = (torch.tensordot(factor.to(found.dtype), found, 1) for found in gradients)
    return (*sums, torch.where(is_real, norms, zeros).to(torch.float32))
