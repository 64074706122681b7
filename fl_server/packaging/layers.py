"""Book-keeping of each layer type: per-sample gradient norms and clipped sums from a layer's input and output gradient.

Per-sample gradients are formed only where that is the cheaper way. A sum of squares that can cancel is never
trusted below its rounding error: a norm that came out too small would let a sample exceed the clipping norm.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# Bounds the rounding of a Gram norm, in units of (sum of |a||b|)^2: some ten float32 roundings of 6e-8.
_GRAM_MARGIN = 1e-6


class LayerGradient(NamedTuple):
    """What one layer adds to a step.

    Attributes:
        squared_norms: Of each sample's gradient, shape (n,).
        clipped_sums: Given one factor a sample, shape (n,), the sums by parameter ("weight", "bias").
    """

    squared_norms: Tensor
    clipped_sums: Callable[[Tensor], dict[str, Tensor]]


def linear_gradient(layer: nn.Linear, inputs: Tensor, gradients: Tensor) -> LayerGradient:
    """Return the gradient of a Linear layer over rows (n, in) or sequences (n, ..., in).

    Source:
        Goodfellow 2015, arXiv:1510.01799, for rows; Li et al. 2022, arXiv:2110.05679, for Gram matrices.
    """
    has_bias = layer.bias is not None
    if inputs.ndim == 2:
        ones = 1.0 if has_bias else 0.0
        squared = (_squared_length(inputs) + ones) * _squared_length(gradients)
        return LayerGradient(squared, lambda factor: _linear_sums(inputs, gradients * factor[:, None], has_bias))
    inputs, gradients = inputs.flatten(1, -2), gradients.flatten(1, -2)
    length, width_in, width_out = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    if length * length * (width_in + width_out) < width_in * width_out:
        squared = _squared_norms_by_gram(inputs, gradients)

        def sums(factor: Tensor) -> dict[str, Tensor]:
            scaled = gradients * factor[:, None, None]
            return _linear_sums(inputs.flatten(0, 1), scaled.flatten(0, 1), has_bias)

        if has_bias:
            squared = squared + _squared_length(gradients.sum(1))
        return LayerGradient(squared, sums)
    arrays = {"weight": gradients.transpose(1, 2) @ inputs}
    if has_bias:
        arrays["bias"] = gradients.sum(1)
    return _from_per_sample(arrays)


def conv2d_gradient(layer: nn.Conv2d, inputs: Tensor, gradients: Tensor) -> LayerGradient:
    """Return the gradient of a Conv2d layer, by matrix products over the unfolded input."""
    samples, groups = inputs.shape[0], layer.groups
    columns = _unfold(layer, inputs, gradients.shape[2], gradients.shape[3])
    if groups == 1:
        weight = gradients.flatten(2) @ columns.transpose(1, 2)
    else:
        grouped = gradients.reshape(samples, groups, layer.out_channels // groups, -1)
        weight = grouped @ columns.reshape(samples, groups, -1, columns.shape[2]).transpose(2, 3)
    arrays = {"weight": weight.reshape(samples, *layer.weight.shape)}
    if layer.bias is not None:
        arrays["bias"] = gradients.sum((2, 3))
    return _from_per_sample(arrays)


def embedding_gradient(layer: nn.Embedding, inputs: Tensor, gradients: Tensor) -> LayerGradient:
    """Return the gradient of an Embedding over tokens (n,) or (n, ...).

    The gradient row of a token is the sum over its positions; each position counts its token's squared row
    divided by how often the token occurs, so no term can cancel another.
    """
    tokens = inputs.reshape(inputs.shape[0], -1)
    rows = gradients.reshape(*tokens.shape, -1)
    if layer.padding_idx is not None:
        rows = rows * (tokens != layer.padding_idx).to(rows.dtype)[:, :, None]
    same = (tokens[:, :, None] == tokens[:, None, :]).to(rows.dtype)
    squared = (_squared_length(same @ rows) / same.sum(2)).sum(1)

    def sums(factor: Tensor) -> dict[str, Tensor]:
        table = torch.zeros_like(layer.weight)
        scaled = rows * factor[:, None, None]
        return {"weight": table.index_add(0, tokens.flatten(), scaled.flatten(0, 1))}

    return LayerGradient(squared, sums)


def check_conv2d(layer: nn.Conv2d) -> str | None:
    """Return what must be changed about `layer`, or None."""
    return None if layer.padding_mode == "zeros" else "use padding_mode='zeros'"


def check_embedding(layer: nn.Embedding) -> str | None:
    """Return what must be changed about `layer`, or None."""
    if layer.max_norm is not None:
        return "leave out max_norm: it changes parameters in the forward pass"
    if layer.scale_grad_by_freq:
        return "leave out scale_grad_by_freq: it makes one sample's gradient depend on the others"
    return None


# By exact type: a subclass may compute something else.
GRADIENTS: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], LayerGradient]] = {
    nn.Linear: linear_gradient,
    nn.Conv2d: conv2d_gradient,
    nn.Embedding: embedding_gradient,
}
CHECKS: Mapping[type[nn.Module], Callable[[Any], str | None]] = {
    nn.Conv2d: check_conv2d,
    nn.Embedding: check_embedding,
}


def _squared_length(rows: Tensor) -> Tensor:
    return (rows * rows).sum(-1)  # x.square() becomes a slow Pow in ONNX


def _linear_sums(inputs: Tensor, scaled: Tensor, has_bias: bool) -> dict[str, Tensor]:  # noqa: FBT001 - private
    sums = {"weight": scaled.t() @ inputs}
    return {**sums, "bias": scaled.sum(0)} if has_bias else sums


def _squared_norms_by_gram(inputs: Tensor, gradients: Tensor) -> Tensor:
    products = (inputs @ inputs.transpose(1, 2)) * (gradients @ gradients.transpose(1, 2))
    lengths = (_squared_length(inputs) * _squared_length(gradients)).sqrt().sum(1)
    return products.sum((1, 2)).clamp(min=0) + _GRAM_MARGIN * lengths * lengths


def _from_per_sample(arrays: dict[str, Tensor]) -> LayerGradient:
    flat = {name: array.flatten(1) for name, array in arrays.items()}
    squared = torch.stack([_squared_length(array) for array in flat.values()]).sum(0)

    def sums(factor: Tensor) -> dict[str, Tensor]:
        return {name: (factor @ array).reshape(arrays[name].shape[1:]) for name, array in flat.items()}

    return LayerGradient(squared, sums)


def _unfold(layer: nn.Conv2d, inputs: Tensor, rows: int, columns: int) -> Tensor:
    """Return what each output position sees, shape (n, channels * kernel, rows * columns)."""
    (top, left), (bottom, right) = _paddings(layer)
    padded = functional.pad(inputs, (left, right, top, bottom))
    windows = [
        padded[:, :, i : i + layer.stride[0] * (rows - 1) + 1 : layer.stride[0],
               j : j + layer.stride[1] * (columns - 1) + 1 : layer.stride[1]]
        for i in range(0, layer.kernel_size[0] * layer.dilation[0], layer.dilation[0])
        for j in range(0, layer.kernel_size[1] * layer.dilation[1], layer.dilation[1])
    ]  # fmt: skip
    return torch.stack(windows, 2).reshape(inputs.shape[0], -1, rows * columns)


def _paddings(layer: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the padding before and after, each (rows, columns)."""
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (total[0] // 2, total[1] // 2), (total[0] - total[0] // 2, total[1] - total[1] // 2)
    rows, columns = int(layer.padding[0]), int(layer.padding[1])
    return (rows, columns), (rows, columns)
