"""From per-sample gradients, in whatever form they are kept, to clipped sums."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fl_server.packaging.layers import LayerGradient

# (x, y, mask, clipping_norm, *parameters) -> (*sums, norms)
Step: TypeAlias = Callable[..., tuple[Tensor, ...]]

# Float32 rounding in a norm, relative; and what keeps a zero gradient from dividing by zero.
_NORM_MARGIN = 1e-6
TINY = 1e-12


def sum_clipped(
    gradients: Mapping[str, LayerGradient], names: Sequence[str], mask: Tensor, clipping_norm: Tensor
) -> tuple[Tensor, ...]:
    """Return the sums over the samples with mask > 0, in the order of `names`, and the norms before clipping.

    Args:
        gradients: By the path of the module that holds the parameters.
        names: Of all parameters.
        mask: Shape (n,).
        clipping_norm: L2 norm to which a sample's gradient over all parameters together is scaled down; a scalar.
    """
    is_real = mask > 0
    squared = [gradient.squared_norms for gradient in gradients.values()]
    norms = (torch.stack(squared).sum(0) if len(squared) > 1 else squared[0]).sqrt()
    factor = torch.clamp(clipping_norm / (norms * (1 + _NORM_MARGIN) + TINY), max=1.0)
    factor = torch.where(is_real, factor, torch.zeros_like(factor))
    sums = {
        f"{path}.{name}".removeprefix("."): value
        for path, gradient in gradients.items()
        for name, value in gradient.clipped_sums(factor).items()
    }
    return (*(sums[name] for name in names), torch.where(is_real, norms, torch.zeros_like(norms)))
