"""Backward operations that have no ONNX translation, or a slow one, written with operations that have a fast one."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fl_server.packaging.unfolding import fold_kernel, unfold, unfold_gradients, unfold_kernel

aten = torch.ops.aten


def convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001
    _output_padding: Any,
    groups: int,
) -> Tensor:
    """Return the output as one matrix product, over the unfolded input that book-keeping needs anyway."""
    if transposed or groups > 1 or inputs.ndim != weight.ndim:
        return NotImplemented  # type: ignore[no-any-return] # make_fx keeps the operation as it is
    stride, padding, dilation = (_by_axis(values, weight.ndim - 2) for values in (stride, padding, dilation))
    settings = zip(inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    lengths = [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in settings]
    columns = unfold(inputs, lengths, weight.shape[2:], stride, [(p, p) for p in padding], dilation, groups)
    rows = columns.flatten(0, 1) @ unfold_kernel(weight).t()
    if bias is not None:
        rows = rows + bias
    return rows.reshape(inputs.shape[0], *lengths, -1).movedim(-1, 1)


def convolution_backward(  # noqa: PLR0913, PLR0917 - the signature is torch's
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    _bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001
    _output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, kernel and bias: a convolution the other way round, a matrix product, a sum."""
    settings = stride, padding, dilation = [_by_axis(v, weight.ndim - 2) for v in (stride, padding, dilation)]
    by_input = by_weight = by_bias = None
    if wanted[0]:
        extra = [0] * len(stride) if transposed else _output_padding_of(inputs, gradient, weight.shape[2:], *settings)
        by_input = aten.convolution(gradient, weight, None, *settings, not transposed, extra, groups)
    if wanted[1]:
        seen, sent = (gradient, inputs) if transposed else (inputs, gradient)
        both_sides = [(p, p) for p in padding]
        columns = unfold(seen, sent.shape[2:], weight.shape[2:], stride, both_sides, dilation, groups)
        products = (unfold_gradients(sent, groups).transpose(1, 2) @ columns).reshape(len(inputs), weight.shape[0], -1)
        by_weight = fold_kernel(products.sum(0), weight.shape)
    if wanted[2]:
        by_bias = gradient.transpose(0, 1).flatten(1).sum(1)
    return by_input, by_weight, by_bias


def max_pool2d_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    _ceil_mode: Any,
    indices: Tensor,
) -> Tensor:
    """Return the gradient sent to each window's largest value, the first of equals.

    Windows side by side need no indices, whose making takes onnxruntime fifteen times as long as the pooling.
    """
    stride = stride or kernel
    rows, columns = gradient.shape[-2] * kernel[0], gradient.shape[-1] * kernel[1]
    is_inside = rows <= inputs.shape[-2] and columns <= inputs.shape[-1]
    if list(stride) == list(kernel) and not any(padding) and is_inside and set(dilation) == {1}:
        found = _spread_over_windows(gradient, inputs[..., :rows, :columns], kernel)
        left = (0, inputs.shape[-1] - columns, 0, inputs.shape[-2] - rows)
        return functional.pad(found, left) if any(left) else found
    flat = torch.zeros_like(inputs).flatten(-2)
    is_apart = all(s >= d * (k - 1) + 1 for k, s, d in zip(kernel, stride, dilation, strict=True))
    scatter = aten.scatter if is_apart else aten.scatter_add
    placed: Tensor = scatter(flat, -1, indices.flatten(-2), gradient.flatten(-2))
    return placed.reshape(inputs.shape)


def avg_pool2d_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,  # noqa: FBT001
    count_include_pad: bool,  # noqa: FBT001
    divisor: int | None,
) -> Tensor:
    """Return the gradient spread evenly over each window, as a transposed convolution."""
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError(
            "average pooling with ceil_mode or count_include_pad=False: leave both at their defaults"
        )
    stride, channels = stride or kernel, inputs.shape[-3]
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or kernel[0] * kernel[1]))
    extra = _output_padding_of(inputs, gradient, kernel, stride, padding, (1, 1))
    spread: Tensor = aten.convolution(gradient, weight, None, stride, padding, (1, 1), True, extra, channels)
    return spread


def threshold_backward(gradient: Tensor, inputs: Tensor, threshold: float) -> Tensor:
    """Return the gradient where the input is above the threshold; a product is eight times faster than Where."""
    return gradient * (inputs > threshold).to(gradient.dtype)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.threshold_backward.default: threshold_backward,
}


def _spread_over_windows(gradient: Tensor, inputs: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return `gradient` sent to the first largest value of each window: within its row first, then among the rows."""
    across = list(inputs.reshape(-1, kernel[1]).t())
    largest = list(accumulate(across, torch.maximum))[-1]
    down = largest.reshape(-1, kernel[0], gradient.shape[-1]).unbind(1)
    of_rows = torch.stack(_send_to_first_largest(gradient.reshape(down[0].shape), down), 1).flatten()
    return torch.stack(_send_to_first_largest(of_rows, across), -1).reshape(inputs.shape)


def _send_to_first_largest(gradient: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return one gradient a part: all of it where the part holds the first of the largest values, else 0."""
    before = list(accumulate(parts, torch.maximum))
    sent = []
    for part, earlier in zip(parts[:0:-1], before[-2::-1], strict=True):
        kept = gradient * (earlier >= part).to(gradient.dtype)
        sent.append(gradient - kept)
        gradient = kept
    return [gradient, *reversed(sent)]


def _by_axis(values: Sequence[int], axes: int) -> list[int]:
    """Return one value an axis; torch may give one for all."""
    return list(values) * axes if len(values) == 1 else list(values)


def _output_padding_of(
    inputs: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return what a strided window left over at the end, by axis."""
    first = inputs.ndim - len(kernel)
    return [
        inputs.shape[first + i]
        - ((gradient.shape[first + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(len(kernel))
    ]
