"""Book-keeping of each layer type: per-sample gradient norms and clipped sums from a layer's inputs and output gradients.

A layer may be used several times in one forward: a sample's gradient is then the sum over the uses, taken before the
norm. Uses of a Linear or Conv layer, and of an Embedding, are simply more positions of the same sample.

Per-sample gradients are formed only where that is the cheaper way. A sum of squares that can cancel is never
trusted below its rounding error: a norm that came out too small would let a sample exceed the clipping norm.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_server.packaging.unfolding import fold_kernel, unfold, unfold_gradients

_ROUNDING = 2.0**-24  # of float32, relative
_BLOCK = 256  # terms that a matrix product adds up one after the other; more are added up in blocks
# What is added up of squares below float32's smallest normal number, 1e-38, may be far too little: no less than this
# enters a product, which could make it large.
_LEAST_SQUARED_LENGTH = 1e-30


class Use(NamedTuple):
    """One call of a layer: what went in, and the gradient of what came out; first axis the sample."""

    inputs: Tensor
    gradients: Tensor


class LayerGradient(NamedTuple):
    """What one layer adds to a step.

    Attributes:
        squared_norms: Of each sample's gradient, shape (n,).
        clipped_sums: Given one factor a sample, shape (n,), the sums by parameter ("weight", "bias").
    """

    squared_norms: Tensor
    clipped_sums: Callable[[Tensor], dict[str, Tensor]]


Rule: TypeAlias = Callable[[Any, Sequence[Use]], LayerGradient]


def linear_gradient(layer: nn.Linear, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of a Linear layer over rows (n, in) or sequences (n, ..., in).

    Source:
        Goodfellow 2015, arXiv:1510.01799, for rows.
    """
    has_bias = layer.bias is not None
    if len(uses) > 1 or uses[0].inputs.ndim > 2:
        inputs, gradients = (torch.cat([_by_position(use[i]) for use in uses], 1) for i in range(2))
        return _positions_gradient(inputs, gradients, has_bias=has_bias)
    inputs, gradients = uses[0]
    of_gradients = _squared_factor(gradients)
    squared = _squared_factor(inputs) * of_gradients
    if has_bias:
        squared = squared + of_gradients
    return LayerGradient(squared, lambda factor: _linear_sums(inputs, gradients * factor[:, None], has_bias=has_bias))


def convolution_gradient(layer: nn.Conv1d | nn.Conv2d, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of a convolution: that of a Linear layer over what each output position sees."""
    columns, gradients = (torch.cat(parts, 1) for parts in zip(*(_unfold_use(layer, use) for use in uses), strict=True))
    has_bias, samples = layer.bias is not None, uses[0].inputs.shape[0]
    if layer.groups == 1:
        squared, sums = _positions_gradient(columns, gradients, has_bias=has_bias)
    else:
        weight = gradients.transpose(1, 2) @ columns
        arrays = {"weight": weight.reshape(samples, layer.out_channels, -1)}
        if has_bias:
            arrays["bias"] = gradients.sum(1).reshape(samples, -1)
        squared, sums = from_per_sample(arrays)

    def folded(factor: Tensor) -> dict[str, Tensor]:
        found = sums(factor)
        return {**found, "weight": fold_kernel(found["weight"], layer.weight.shape)}

    return LayerGradient(squared, folded)


def embedding_gradient(layer: nn.Embedding, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of an Embedding over tokens (n,) or (n, ...).

    The gradient row of a token is the sum over its positions; each position counts its token's squared row
    divided by how often the token occurs, so no term can cancel another.
    """
    samples, width = uses[0].inputs.shape[0], layer.embedding_dim
    tokens = torch.cat([use.inputs.reshape(samples, -1) for use in uses], 1)
    # onnxruntime counts negative tokens from the end: one row of the table under two names would escape the norm.
    tokens = torch.where(tokens < 0, tokens + layer.num_embeddings, tokens)
    rows = torch.cat([use.gradients.reshape(samples, -1, width) for use in uses], 1)
    if layer.padding_idx is not None:
        rows = rows * (tokens != layer.padding_idx).to(rows.dtype)[:, :, None]
    same = (tokens[:, :, None] == tokens[:, None, :]).to(rows.dtype)
    squared = (_squared_length(same @ rows) / same.sum(2)).sum(1)

    def sums(factor: Tensor) -> dict[str, Tensor]:
        table = torch.zeros_like(layer.weight)
        scaled = rows * factor[:, None, None]
        return {"weight": table.index_add(0, tokens.flatten(), scaled.flatten(0, 1))}

    return LayerGradient(squared, sums)


def layer_norm_gradient(layer: nn.LayerNorm, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of a LayerNorm's scale and shift, over (n, ..., *normalized_shape)."""

    def normalise(inputs: Tensor) -> Tensor:
        return functional.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)

    return _scale_gradient(layer, normalise, uses, lambda array: _sum_positions(array, len(layer.normalized_shape)))


def rms_norm_gradient(layer: nn.RMSNorm, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of an RMSNorm's scale, over (n, ..., *normalized_shape)."""

    def normalise(inputs: Tensor) -> Tensor:
        return functional.rms_norm(inputs, list(layer.normalized_shape), None, layer.eps)

    return _scale_gradient(layer, normalise, uses, lambda array: _sum_positions(array, len(layer.normalized_shape)))


def group_norm_gradient(layer: nn.GroupNorm, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of a GroupNorm's scale and shift, over (n, channels, ...)."""

    def normalise(inputs: Tensor) -> Tensor:
        return functional.group_norm(inputs, layer.num_groups, None, None, layer.eps)

    return _scale_gradient(layer, normalise, uses, _sum_pixels)


def instance_norm_gradient(layer: nn.InstanceNorm1d | nn.InstanceNorm2d, uses: Sequence[Use]) -> LayerGradient:
    """Return the gradient of an InstanceNorm's scale and shift, over (n, channels, ...)."""

    def normalise(inputs: Tensor) -> Tensor:
        return functional.instance_norm(inputs, eps=layer.eps)

    return _scale_gradient(layer, normalise, uses, _sum_pixels)


def check_convolution(layer: nn.Conv1d | nn.Conv2d) -> str | None:
    """Return why book-keeping does not cover `layer`, or None."""
    return None if layer.padding_mode == "zeros" else f"padding_mode is {layer.padding_mode!r}, not 'zeros'"


def check_instance_norm(layer: nn.InstanceNorm1d | nn.InstanceNorm2d) -> str | None:
    """Return why book-keeping does not cover `layer`, or None."""
    return "it normalises by running statistics" if layer.track_running_stats else None


# By exact type: a subclass may compute something else.
RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: linear_gradient,
    nn.Conv1d: convolution_gradient,
    nn.Conv2d: convolution_gradient,
    nn.Embedding: embedding_gradient,
    nn.LayerNorm: layer_norm_gradient,
    nn.RMSNorm: rms_norm_gradient,
    nn.GroupNorm: group_norm_gradient,
    nn.InstanceNorm1d: instance_norm_gradient,
    nn.InstanceNorm2d: instance_norm_gradient,
}
CHECKS: Mapping[type[nn.Module], Callable[[Any], str | None]] = {
    nn.Conv1d: check_convolution,
    nn.Conv2d: check_convolution,
    nn.InstanceNorm1d: check_instance_norm,
    nn.InstanceNorm2d: check_instance_norm,
}


def from_per_sample(arrays: Mapping[str, Tensor]) -> LayerGradient:
    """Return the gradient whose values of each sample are given, by parameter, each of shape (n, ...)."""
    flat = {name: array.reshape(array.shape[0], -1) for name, array in arrays.items()}
    # In two stages: the rounding of one long sum grows with its length, to a percent for ten million values.
    squared = _add(
        [
            _squared_length(arrays[name].flatten(2)).sum(1) if arrays[name].ndim > 2 else _squared_length(array)
            for name, array in flat.items()
        ]
    )

    def sums(factor: Tensor) -> dict[str, Tensor]:
        return {name: (factor @ array).reshape(arrays[name].shape[1:]) for name, array in flat.items()}

    return LayerGradient(squared, sums)


def _positions_gradient(inputs: Tensor, gradients: Tensor, *, has_bias: bool) -> LayerGradient:
    """Return the gradient of a Linear layer over positions: inputs (n, length, in), gradients (n, length, out).

    Source:
        Li et al. 2022, arXiv:2110.05679, for norms by Gram matrices.
    """
    length, width_in, width_out = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    if length * length * (width_in + width_out) >= width_in * width_out:
        arrays = {"weight": gradients.transpose(1, 2) @ inputs}
        if has_bias:
            arrays["bias"] = gradients.sum(1)
        return from_per_sample(arrays)
    squared = _squared_norms_by_gram(inputs, gradients)
    if has_bias:
        squared = squared + _squared_length(gradients.sum(1))

    def sums(factor: Tensor) -> dict[str, Tensor]:
        scaled = gradients * factor[:, None, None]
        return _linear_sums(inputs.flatten(0, 1), scaled.flatten(0, 1), has_bias=has_bias)

    return LayerGradient(squared, sums)


def _scale_gradient(
    layer: nn.Module, normalise: Callable[[Tensor], Tensor], uses: Sequence[Use], reduce: Callable[[Tensor], Tensor]
) -> LayerGradient:
    """Return the gradient of a layer that scales, and shifts, what it has normalised."""
    arrays = {"weight": _add([reduce(use.gradients * normalise(use.inputs)) for use in uses])}
    if getattr(layer, "bias", None) is not None:
        arrays["bias"] = _add([reduce(use.gradients) for use in uses])
    return from_per_sample(arrays)


def _unfold_use(layer: nn.Conv1d | nn.Conv2d, use: Use) -> tuple[Tensor, Tensor]:
    lengths = use.gradients.shape[2:]
    padding, groups = _padding(layer), layer.groups
    columns = unfold(use.inputs, lengths, layer.kernel_size, layer.stride, padding, layer.dilation, groups)
    return columns, unfold_gradients(use.gradients, groups)


def _by_position(array: Tensor) -> Tensor:
    """Return `array`, shape (n, ..., width), as (n, positions, width)."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _sum_positions(array: Tensor, kept: int) -> Tensor:
    """Return the sum over all axes but the first and the last `kept`."""
    axes = tuple(range(1, array.ndim - kept))
    return array.sum(axes) if axes else array


def _sum_pixels(array: Tensor) -> Tensor:
    """Return the sum over all axes but the first two."""
    return array.flatten(2).sum(2) if array.ndim > 2 else array


def _add(arrays: Sequence[Tensor]) -> Tensor:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _squared_length(rows: Tensor) -> Tensor:
    return (rows * rows).sum(-1)  # x.square() becomes a slow Pow in ONNX


def _squared_factor(rows: Tensor) -> Tensor:
    """Return the squared length as one factor of a product; never too small."""
    squared = _squared_length(rows)
    return torch.maximum(squared, torch.full_like(squared, _LEAST_SQUARED_LENGTH))


def _linear_sums(inputs: Tensor, scaled: Tensor, *, has_bias: bool) -> dict[str, Tensor]:
    sums = {"weight": scaled.t() @ inputs}
    return {**sums, "bias": scaled.sum(0)} if has_bias else sums


def _squared_norms_by_gram(inputs: Tensor, gradients: Tensor) -> Tensor:
    products = (inputs @ inputs.transpose(1, 2)) * (gradients @ gradients.transpose(1, 2))
    lengths = (_squared_factor(inputs) * _squared_factor(gradients)).sqrt().sum(1)
    rounding = _ROUNDING * sum(min(array.shape[2], _BLOCK) for array in (inputs, gradients))
    total = products.sum((1, 2))
    # Not clamp: onnxruntime's Clip makes a large finite number of infinity. Squared first: no product overflows alone.
    return torch.maximum(total, torch.zeros_like(total)) + lengths * lengths * rounding


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """Return the padding before and after, by axis."""
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(int(p), int(p)) for p in layer.padding]
