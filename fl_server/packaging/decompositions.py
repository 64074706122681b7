"""Backward operations that have no ONNX translation, written with operations that have one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def convolution_backward(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    _bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    _transposed: bool,  # noqa: FBT001
    _output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """Return the input's gradient as a transposed convolution; those of the parameters come from book-keeping."""
    if wanted[1] or wanted[2]:
        raise NotImplementedError("gradient of a convolution's parameters")
    if not wanted[0]:
        return None, None, None
    extra = _output_padding_of(inputs, gradient, weight.shape[2:], stride, padding, dilation)
    return aten.convolution(gradient, weight, None, stride, padding, dilation, True, extra, groups), None, None


def max_pool2d_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    _padding: Any,
    dilation: Sequence[int],
    _ceil_mode: Any,
    indices: Tensor,
) -> Tensor:
    """Return the gradient sent to each window's largest value; plain scatter, unless windows can share one."""
    flat = torch.zeros_like(inputs).flatten(-2)
    is_apart = all(s >= d * (k - 1) + 1 for k, s, d in zip(kernel, stride or kernel, dilation, strict=True))
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
        raise NotImplementedError("average pooling with ceil_mode or count_include_pad=False")
    stride, channels = stride or kernel, inputs.shape[1]
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or kernel[0] * kernel[1]))
    extra = _output_padding_of(inputs, gradient, kernel, stride, padding, (1, 1))
    spread: Tensor = aten.convolution(gradient, weight, None, stride, padding, (1, 1), True, extra, channels)
    return spread


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
}


def _output_padding_of(
    inputs: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return what a strided window left over at the end, by axis."""
    return [
        inputs.shape[2 + i]
        - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(2)
    ]
