"""The losses a definition may name, as one value a sample, and the targets they ask for."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from models.definitions.definition import ModelDefinition
from models.tensors.spec import TensorSpec

SampleLosses: TypeAlias = Callable[[Tensor, Tensor], Tensor]

TARGET_NAME = "y"


def build_sample_losses(definition: ModelDefinition) -> SampleLosses:
    """Return the function (output, target) -> losses, shape (n,)."""
    loss = definition.loss
    if loss == "cross_entropy":
        return _cross_entropies
    if loss == "mse":
        return lambda output, y: _by_sample(functional.mse_loss(output.reshape(y.shape), y, reduction="none"))
    if loss == "bce_with_logits":
        return lambda output, y: _by_sample(
            functional.binary_cross_entropy_with_logits(output.reshape(y.shape), y, reduction="none")
        )
    assert callable(loss)  # the definition checked

    def row_loss(output: Tensor, y: Tensor) -> Tensor:
        return loss(output[None], y[None]).reshape(())

    by_row: SampleLosses = torch.vmap(row_loss)
    return by_row


def build_target_spec(definition: ModelDefinition) -> TensorSpec:
    """Return what y looks like: class indices, or numbers shaped as the output without a last axis of one.

    A loss that is a function gets class indices if the definition has labels, else numbers.
    """
    row_shape = definition.outputs[0].row_shape
    if definition.loss == "cross_entropy" or (callable(definition.loss) and definition.labels):
        return TensorSpec(TARGET_NAME, ("batch", *row_shape[1:]), "int64")
    return TensorSpec(TARGET_NAME, ("batch", *(() if row_shape == (1,) else row_shape)), "float32")


def _cross_entropies(output: Tensor, y: Tensor) -> Tensor:
    if output.ndim == 2:  # without the ignored index of torch, which costs the graph eight nodes
        return -functional.log_softmax(output, 1).gather(1, y[:, None])[:, 0]
    return _by_sample(functional.cross_entropy(output, y, reduction="none"))


def _by_sample(losses: Tensor) -> Tensor:
    return losses.reshape(losses.shape[0], -1).sum(1)
