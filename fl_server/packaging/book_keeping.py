"""The step by book-keeping: one backward pass of the summed loss, and what each layer then knows of its samples.

Source:
    Bu et al. 2023, arXiv:2210.00038.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_server.errors import DefinitionError
from fl_server.packaging.clipping import sum_clipped
from fl_server.packaging.layers import CHECKS, RULES, LayerGradient, Use
from models.definitions.losses import SampleLosses
from models.definitions.substitutes import Step


class UnderivableError(DefinitionError):
    """Book-keeping does not cover the module: its gradients must be taken sample by sample."""


def build_book_keeping_step(module: nn.Module, sample_losses: SampleLosses) -> Step:
    """Return the step function of `module`.

    Raises:
        UnderivableError: A parameter is not that of a layer with a rule, or of two layers; while running, a layer's
            first axis is not the samples, or its forward is not called.
    """
    layers = _find_layers(module)
    names = [name for name, _ in module.named_parameters()]

    def step(x: Tensor, y: Tensor, mask: Tensor, clipping_norm: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        uses = _trace_uses(module, layers, dict(zip(names, values, strict=True)), sample_losses, x, y)
        gradients = {path: _get_gradient(path, layer, uses[path], len(x)) for path, layer in layers.items()}
        return sum_clipped(gradients, names, mask, clipping_norm)

    return step


def _find_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the trainable layers by module path, in the order of the module."""
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (first := owners.setdefault(id(parameter), name)) != name:
            raise UnderivableError(f"{name} shares its values with {first}")
    layers = {path: child for path, child in module.named_modules() if list(child.parameters(recurse=False))}
    for path, layer in layers.items():
        if type(layer) not in RULES:
            raise UnderivableError(f"{name_layer(path, layer)} has no rule of its own")
        if reason := CHECKS.get(type(layer), lambda _: None)(layer):
            raise UnderivableError(f"{name_layer(path, layer)}: {reason}")
    return layers


def name_layer(path: str, layer: nn.Module) -> str:
    """Return how messages call the layer at `path`."""
    return f"{path or 'the module itself'} ({type(layer).__name__})"


def _trace_uses(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    parameters: dict[str, Tensor],
    sample_losses: SampleLosses,
    x: Tensor,
    y: Tensor,
) -> dict[str, list[Use]]:
    """Run `module` forward and backward; return every call of every layer."""
    taps: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in layers}
    handles = [layer.register_forward_hook(_build_hook(taps[path]), with_kwargs=True) for path, layer in layers.items()]
    with torch.enable_grad():
        try:
            output = functional_call(module, parameters, (x,))
        finally:
            for handle in handles:
                handle.remove()
        for path, layer in layers.items():
            if not taps[path]:
                raise UnderivableError(f"{name_layer(path, layer)}: its forward is not called")
        loss = sample_losses(output, y).sum()
        outputs = [tapped for calls in taps.values() for _, tapped in calls]
        found = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    return {path: [_get_use(*call, next(found)) for call in calls] for path, calls in taps.items()}


def _build_hook(calls: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def hook(_layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        calls.append(((args or tuple(kwargs.values()))[0].detach(), output))
        return output.clone()  # what follows may work in place

    return hook


def _get_use(inputs: Tensor, output: Tensor, gradient: Tensor | None) -> Use:
    return Use(inputs, torch.zeros_like(output) if gradient is None else gradient.detach())


def _get_gradient(path: str, layer: nn.Module, uses: Sequence[Use], samples: int) -> LayerGradient:
    for use in uses:
        if use.inputs.shape[0] != samples or use.gradients.shape[0] != samples:
            raise UnderivableError(
                f"{name_layer(path, layer)}: its input has shape {tuple(use.inputs.shape)}, whose first axis is not "
                f"the {samples} samples"
            )
    return RULES[type(layer)](layer, uses)
