"""The DP-SGD step of a plain nn.Module, derived by forward hooks.

One backward pass of the summed loss gives the gradient of every trainable layer's output; with the layer's
input it yields each sample's gradient norm and the clipped sum (`layers.py`). What cannot be derived this way
is refused with its module path; `check_step` then compares the result with one plain backward pass a sample.

Source:
    Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_server.errors import DefinitionError
from fl_server.packaging.layers import CHECKS, GRADIENTS, LayerGradient
from fl_server.packaging.losses import SampleLosses

Step: TypeAlias = Callable[..., tuple[Tensor, ...]]

# Float32 rounding in a norm, relative; and what keeps a zero gradient from dividing by zero.
_NORM_MARGIN = 1e-6
_TINY = 1e-12
_CHECKED_ROWS = 4
_CHECK_TOLERANCE = 1e-3  # of the clipping norm: far above float32 rounding, far below any missing term

_ADVICE: dict[type[nn.Module], str] = {
    nn.LayerNorm: "use nn.LayerNorm(..., elementwise_affine=False)",
    nn.GroupNorm: "use nn.GroupNorm(..., affine=False)",
    nn.InstanceNorm2d: "use nn.InstanceNorm2d(..., affine=False)",
    nn.EmbeddingBag: "use nn.Embedding and a mean or sum",
    nn.Conv1d: "use nn.Conv2d over an axis of length one",
    nn.PReLU: "use nn.LeakyReLU",
}
_SUPPORTED = "use nn.Linear, nn.Conv2d or nn.Embedding"


@dataclass(slots=True)
class _Taps:
    """What the hooks saw in one forward pass, by layer name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def find_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the trainable layers by module path, in the order of the module.

    Raises:
        DefinitionError: The step of `module` cannot be derived; names the module and what to use instead.
    """
    _check_parameters(module)
    layers = {}
    for path, child in module.named_modules():
        where = f"{path or 'the module itself'} ({type(child).__name__})"
        if isinstance(child, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the one base of all batch norms
            raise DefinitionError(f"{where}: batch statistics mix samples; use nn.GroupNorm(..., affine=False) instead")
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:  # noqa: SLF001 - as above
            raise DefinitionError(f"{where}: random layers cannot be part of the step graph; leave it out")
        if not list(child.parameters(recurse=False)):
            continue
        if type(child) not in GRADIENTS:
            advice = _ADVICE.get(type(child), _SUPPORTED)
            raise DefinitionError(f"{where}: its parameters cannot be trained privately; {advice} instead")
        if change := CHECKS.get(type(child), lambda _: None)(child):
            raise DefinitionError(f"{where}: {change}")
        layers[path] = child
    if not layers:
        raise DefinitionError(f"the module has no trainable layer; {_SUPPORTED}")
    return layers


def build_training_step(module: nn.Module, sample_losses: SampleLosses) -> Step:
    """Return the function (x, y, mask, clipping_norm, *parameters) -> (*sums, norms).

    The parameters come in the order of `module.named_parameters()`; so do the sums over the samples with
    mask > 0 of their gradients, each scaled down to L2 norm `clipping_norm` over all parameters together.
    The norms are those before clipping, shape (n,), and 0 where mask is 0.

    Raises:
        DefinitionError: As `find_layers`; while running, also for a layer that is not used exactly once.
    """
    layers = find_layers(module)
    names = [name for name, _ in module.named_parameters()]

    def step(x: Tensor, y: Tensor, mask: Tensor, clipping_norm: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=True))
        taps, gradients = _backward(module, layers, parameters, sample_losses, x, y)
        kept = {path: _layer_gradient(path, layer, taps, gradients, len(x)) for path, layer in layers.items()}
        is_real = mask > 0
        norms = torch.stack([gradient.squared_norms for gradient in kept.values()]).sum(0).sqrt()
        factor = torch.clamp(clipping_norm / (norms * (1 + _NORM_MARGIN) + _TINY), max=1.0)
        factor = torch.where(is_real, factor, torch.zeros_like(factor))
        sums = {
            f"{path}.{name}".removeprefix("."): value
            for path, gradient in kept.items()
            for name, value in gradient.clipped_sums(factor).items()
        }
        return (*(sums[name] for name in names), torch.where(is_real, norms, torch.zeros_like(norms)))

    return step


def build_evaluation(module: nn.Module, sample_losses: SampleLosses) -> Step:
    """Return the function (x, y, mask, *parameters) -> (summed loss of the samples with mask > 0, raw output)."""
    names = [name for name, _ in module.named_parameters()]

    def evaluation(x: Tensor, y: Tensor, mask: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output = functional_call(module, dict(zip(names, values, strict=True)), (x,))
        losses = sample_losses(output, y)
        return torch.where(mask > 0, losses, torch.zeros_like(losses)).sum(), output

    return evaluation


def check_step(
    module: nn.Module, step: Step, sample_losses: SampleLosses, x: Tensor, y: Tensor, parameters: dict[str, Tensor]
) -> None:
    """Compare `step` with one plain backward pass a sample, on the first rows of `x` and `y`.

    Catches what no list of layers can: parameters used behind a hook's back, samples that influence each other.

    Raises:
        DefinitionError: They differ.
    """
    rows = min(_CHECKED_ROWS, len(x))
    by_row = [_row_gradient(module, sample_losses, x[i : i + 1], y[i : i + 1], parameters) for i in range(rows)]
    norms = torch.stack([torch.cat([gradient.flatten() for gradient in row]).norm() for row in by_row])
    clipping_norm = norms.median().clamp(min=1e-3)
    factor = torch.clamp(clipping_norm / (norms + _TINY), max=1.0)
    mask = (torch.arange(len(x)) < rows).to(torch.float32)
    *sums, found = step(x, y, mask, clipping_norm, *parameters.values())
    tolerance = float(clipping_norm) * _CHECK_TOLERANCE
    for i, (name, value) in enumerate(zip(parameters, sums, strict=True)):
        expected = torch.stack([f * row[i] for f, row in zip(factor, by_row, strict=True)]).sum(0)
        if not torch.allclose(value, expected, rtol=0, atol=tolerance):
            raise DefinitionError(
                f"{name}: its clipped gradient differs from one backward pass a sample: samples influence each "
                "other, or the parameter is also used outside its layer's forward"
            )
    if not torch.allclose(found[:rows], norms, rtol=_CHECK_TOLERANCE, atol=1e-6):
        raise DefinitionError(
            "the per-sample norms differ from one backward pass a sample: samples influence each other"
        )


def _check_parameters(module: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (first := owners.setdefault(id(parameter), name)) != name:
            raise DefinitionError(f"{name}: shares its values with {first}; give each layer parameters of its own")
        if not parameter.requires_grad:
            raise DefinitionError(f"{name}: does not require a gradient; register constants as buffers")
        if parameter.dtype != torch.float32:
            raise DefinitionError(f"{name}: is {parameter.dtype}, parameters must be torch.float32")


def _backward(
    module: nn.Module,
    layers: dict[str, nn.Module],
    parameters: dict[str, Tensor],
    sample_losses: SampleLosses,
    x: Tensor,
    y: Tensor,
) -> tuple[_Taps, dict[str, Tensor]]:
    with torch.enable_grad():
        output, taps = _forward(module, layers, parameters, x)
        for path, layer in layers.items():
            if path not in taps.outputs:
                raise DefinitionError(
                    f"{path} ({type(layer).__name__}): its forward is not called; remove it, or call the layer itself"
                )
        loss = sample_losses(output, y).sum()
        found = torch.autograd.grad(loss, [taps.outputs[path] for path in layers], allow_unused=True)
    gradients = {}
    for (path, layer), gradient in zip(layers.items(), found, strict=True):
        if gradient is None:
            raise DefinitionError(f"{path} ({type(layer).__name__}): the loss does not depend on it; remove it")
        gradients[path] = gradient.detach()
    return taps, gradients


def _forward(
    module: nn.Module, layers: dict[str, nn.Module], parameters: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, _Taps]:
    taps = _Taps({}, {})
    handles = [layer.register_forward_hook(_build_hook(path, taps), with_kwargs=True) for path, layer in layers.items()]
    try:
        return functional_call(module, parameters, (x,)), taps
    finally:
        for handle in handles:
            handle.remove()


def _build_hook(path: str, taps: _Taps) -> Callable[..., Tensor]:
    def hook(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if path in taps.outputs:
            raise DefinitionError(
                f"{path} ({type(layer).__name__}): is used twice in one forward; give each use a layer of its own"
            )
        taps.inputs[path] = (args or tuple(kwargs.values()))[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        taps.outputs[path] = output
        return output.clone()  # what follows may work in place

    return hook


def _layer_gradient(
    path: str, layer: nn.Module, taps: _Taps, gradients: dict[str, Tensor], samples: int
) -> LayerGradient:
    if taps.inputs[path].shape[0] != samples or gradients[path].shape[0] != samples:
        raise DefinitionError(
            f"{path} ({type(layer).__name__}): its input has shape {tuple(taps.inputs[path].shape)}; "
            f"the first axis must be the {samples} samples"
        )
    return GRADIENTS[type(layer)](layer, taps.inputs[path], gradients[path])


def _row_gradient(
    module: nn.Module, sample_losses: SampleLosses, x: Tensor, y: Tensor, parameters: dict[str, Tensor]
) -> list[Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss = sample_losses(functional_call(module, leaves, (x,)), y).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), found, strict=True)]
