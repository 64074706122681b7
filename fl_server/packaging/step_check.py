"""What no step can be derived for, and whether a derived one is right."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_server.errors import DefinitionError
from models.definitions.losses import SampleLosses
from models.definitions.substitutes import Step

_CHECKED_ROWS = 4
_CHECK_TOLERANCE = 1e-3  # of the clipping norm: far above float32 rounding, far below any missing term


def check_module(module: nn.Module) -> None:
    """Refuse what mixes samples, is random, or is no trainable parameter.

    Raises:
        DefinitionError: Names the module and what to use instead.
    """
    if not list(module.parameters()):
        raise DefinitionError("the module has no trainable layer; use nn.Linear, nn.Conv2d or nn.Embedding")
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise DefinitionError(f"{name}: does not require a gradient; register constants as buffers")
        if parameter.dtype != torch.float32:
            raise DefinitionError(f"{name}: is {parameter.dtype}, parameters must be torch.float32")
    for path, child in module.named_modules():
        where = f"{path or 'the module itself'} ({type(child).__name__})"
        if isinstance(child, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the one base of all batch norms
            raise DefinitionError(f"{where}: batch statistics mix samples; use nn.GroupNorm instead")
        if _get_dropout(child) > 0:
            raise DefinitionError(f"{where}: random layers cannot be part of the step graph; leave dropout out")
        if isinstance(child, nn.Embedding | nn.EmbeddingBag):
            _check_embedding(child, where)


def check_rows(module: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> None:
    """Run the first rows of `x` together, again, and each alone.

    Raises:
        DefinitionError: The outputs differ: the module is random, or samples influence each other.
    """
    with torch.no_grad():
        together, again = (functional_call(module, parameters, (x,))[:_CHECKED_ROWS] for _ in range(2))
        if not torch.equal(together, again):
            raise DefinitionError("two runs on the same input differ: random parts cannot be part of the step graph")
        alone = torch.cat([functional_call(module, parameters, (row[None],)) for row in x[:_CHECKED_ROWS]])
    tolerance = _CHECK_TOLERANCE * max(1.0, float(together.abs().max()))
    if alone.shape != together.shape or not torch.allclose(alone, together, rtol=0, atol=tolerance):
        raise DefinitionError(
            "a sample's output depends on the other samples of its batch; use nn.GroupNorm or nn.LayerNorm to normalise"
        )


def check_step(
    module: nn.Module, step: Step, sample_losses: SampleLosses, x: Tensor, y: Tensor, parameters: dict[str, Tensor]
) -> None:
    """Compare `step` with one plain backward pass a sample, on the first rows of `x` and `y`.

    Catches what no list of layers can: parameters used behind a hook's back, for one.

    Raises:
        DefinitionError: They differ, or a parameter has no effect.
    """
    rows = min(_CHECKED_ROWS, len(x))
    by_row = [_row_gradient(module, sample_losses, x[i : i + 1], y[i : i + 1], parameters) for i in range(rows)]
    norms = torch.stack([torch.cat([gradient.flatten() for gradient in row]).norm() for row in by_row])
    clipping_norm = norms.median().clamp(min=1e-3)
    factor = torch.where(norms <= clipping_norm, torch.ones_like(norms), clipping_norm / norms)
    mask = (torch.arange(len(x)) < rows).to(torch.float32)
    *sums, found = step(x, y, mask, clipping_norm, *parameters.values())
    tolerance = float(clipping_norm) * _CHECK_TOLERANCE
    for i, (name, value) in enumerate(zip(parameters, sums, strict=True)):
        expected = torch.stack([f * row[i] for f, row in zip(factor, by_row, strict=True)]).sum(0)
        if not torch.allclose(value, expected, rtol=0, atol=tolerance):
            raise DefinitionError(f"{name}: its clipped gradient differs from one backward pass a sample")
    if not torch.allclose(found[:rows], norms, rtol=_CHECK_TOLERANCE, atol=1e-6):
        raise DefinitionError("the per-sample norms differ from one backward pass a sample")


def _get_dropout(module: nn.Module) -> float:
    """Return the chance with which `module` drops something while training."""
    if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the one base of all dropouts
        return module.p
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return float(module.dropout)
    return 0.0


def _check_embedding(layer: nn.Embedding | nn.EmbeddingBag, where: str) -> None:
    if layer.max_norm is not None:
        raise DefinitionError(f"{where}: leave out max_norm: it changes parameters in the forward pass")
    if layer.scale_grad_by_freq:
        raise DefinitionError(
            f"{where}: leave out scale_grad_by_freq: it makes one sample's gradient depend on the others"
        )


def _row_gradient(
    module: nn.Module, sample_losses: SampleLosses, x: Tensor, y: Tensor, parameters: dict[str, Tensor]
) -> list[Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss = sample_losses(functional_call(module, leaves, (x,)), y).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        if gradient is None:
            raise DefinitionError(f"{name}: the loss does not depend on it; remove its layer")
    return [gradient for gradient in found if gradient is not None]
