"""The DP-SGD step of a plain nn.Module, and its evaluation, as functions to be traced into graphs.

Book-keeping first (`book_keeping.py`): it never forms a sample's gradient where a norm and a sum will do. A module
that is trained in ways which layers do not show takes the general way instead, one gradient a sample (`per_sample.py`).
Either is compared with one plain backward pass a sample before it counts.
"""

import logging

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_server.errors import DefinitionError
from fl_server.packaging.book_keeping import build_book_keeping_step
from fl_server.packaging.per_sample import build_per_sample_step
from fl_server.packaging.step_check import check_rows, check_step
from models.definitions.losses import SampleLosses
from models.definitions.substitutes import Step, build_substituted, restore_parameters

_LOG = logging.getLogger(__name__)


def derive_training_step(
    module: nn.Module, sample_losses: SampleLosses, x: Tensor, y: Tensor, parameters: dict[str, Tensor]
) -> tuple[Step, str | None]:
    """Return the function (x, y, mask, clipping_norm, *parameters) -> (*sums, norms), and why it is the slow one.

    The parameters come in the order of `module.named_parameters()`; so do the sums over the samples with
    mask > 0 of their gradients, each scaled down to L2 norm `clipping_norm` over all parameters together.
    The norms are those before clipping, shape (n,), and 0 where mask is 0.

    Args:
        module: To be trained; `check_module` has seen it.
        sample_losses: Its loss.
        x: One batch to try the step on; y: its targets.
        y: As above.
        parameters: Random ones, to try it with.

    Returns:
        The step, and None if book-keeping gave it, or why it takes one gradient a sample.

    Raises:
        DefinitionError: A sample's output depends on others or on chance, or torch cannot take its gradients sample by sample.
    """
    check_rows(module, x, parameters)
    substituted, parts = build_substituted(module)
    try:
        step = restore_parameters(build_book_keeping_step(substituted, sample_losses), substituted, parts)
        check_step(module, step, sample_losses, x, y, parameters)
    except DefinitionError as error:
        reason = str(error)
    else:
        return step, None
    step = restore_parameters(build_per_sample_step(substituted, sample_losses), substituted, parts)
    try:
        check_step(module, step, sample_losses, x, y, parameters)
    except DefinitionError:
        raise
    except Exception as error:  # torch's own, from whatever has no batching rule
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise DefinitionError(f"{reason}; and gradients sample by sample fail: {what}") from error
    _LOG.warning("training step by one gradient a sample, which is slower than book-keeping: %s", reason)
    return step, reason


def build_evaluation(module: nn.Module, sample_losses: SampleLosses) -> Step:
    """Return the function (x, y, mask, *parameters) -> (summed loss of the samples with mask > 0, raw output)."""
    names = [name for name, _ in module.named_parameters()]

    def evaluation(x: Tensor, y: Tensor, mask: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output = functional_call(module, dict(zip(names, values, strict=True)), (x,))
        losses = sample_losses(output, y)
        return torch.where(mask > 0, losses, torch.zeros_like(losses)).sum(), output

    return evaluation
