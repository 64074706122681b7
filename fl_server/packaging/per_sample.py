"""The step for any module: the gradient of each sample alone, by vmap; exact, but memory and time grow with batch."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_server.packaging.clipping import sum_clipped
from fl_server.packaging.layers import from_per_sample
from models.definitions.losses import SampleLosses
from models.definitions.substitutes import Step


def build_per_sample_step(module: nn.Module, sample_losses: SampleLosses) -> Step:
    """Return the step function of `module`; running it raises whatever torch has no batching rule for."""
    names = [name for name, _ in module.named_parameters()]

    def loss_of_row(values: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(module, dict(zip(names, values, strict=True)), (x[None],))
        return sample_losses(output, y[None]).sum()

    gradients_of_rows = torch.vmap(torch.func.grad(loss_of_row), in_dims=(None, 0, 0))

    def step(x: Tensor, y: Tensor, mask: Tensor, clipping_norm: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        found = gradients_of_rows(values, x, y)
        gradient = from_per_sample(dict(zip(names, found, strict=True)))
        return sum_clipped({"": gradient}, names, mask, clipping_norm)

    return step
