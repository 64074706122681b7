"""From per-sample gradients, in whatever form they are kept, to clipped sums."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fl_server.packaging.layers import LayerGradient


def sum_clipped(
    gradients: Mapping[str, LayerGradient], names: Sequence[str], mask: Tensor, clipping_norm: Tensor
) -> tuple[Tensor, ...]:
    """Return the sums over the samples with mask > 0, in the order of `names`, and the norms before clipping.

    Args:
        gradients: By the path of the module that holds the parameters.
        names: Of all parameters.
        mask: Shape (n,).
        clipping_norm: L2 norm to which a sample's gradient over all parameters together is scaled down; a scalar.
            What float32 rounding lets a sample exceed it by, the device's noise stands for: a margin here would be so
            near to 1 that the exporter takes it for 1.
    """
    is_real = mask > 0
    squared = [gradient.squared_norms for gradient in gradients.values()]
    norms = (torch.stack(squared).sum(0) if len(squared) > 1 else squared[0]).sqrt()
    zeros = torch.zeros_like(norms)
    # By comparison, in which a norm that is not a number stays one on every processor; a Clip may make it 1.
    factor = torch.where(norms <= clipping_norm, torch.ones_like(norms), clipping_norm / norms)
    factor = torch.where(is_real, factor, zeros)
    sums = {
        f"{path}.{name}".removeprefix("."): value
        for path, gradient in gradients.items()
        for name, value in gradient.clipped_sums(factor).items()
    }
    return (*(sums[name] for name in names), torch.where(is_real, norms, zeros))
