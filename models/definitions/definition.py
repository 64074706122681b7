"""ModelDefinition: all that a user writes to bring a model of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models.contract.topics import check_name
from models.tensors.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Loss = Literal["cross_entropy", "mse", "bce_with_logits"]
Metric = Literal["accuracy", "auc", "rmse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefinition:
    """One model, from which everything else is derived.

    Attributes:
        name: In URLs, topics and file names.
        build: Returns a fresh plain `nn.Module`; what prepares the raw input is part of it, so that
            serving and training cannot differ.
        inputs: Tensors of the module, in the order of its arguments; one for now.
        outputs: Tensors it returns; one for now.
        loss: By name, or a function (output, target) -> summable scalar.
        metric: By name, or a function (output, target) -> float over NumPy arrays.
        labels: Names of the classes, in the order of the last output axis.
        batch: Rows in one run of the training graph.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    loss: Loss | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    metric: Metric | Callable[[Any, Any], float]
    labels: tuple[str, ...] = ()
    batch: int = 64

    def __post_init__(self) -> None:
        check_name(self.name, "model")
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise ValueError(f"definition {self.name!r}: one input and one output are supported")
        if self.batch < 1:
            raise ValueError(f"definition {self.name!r}: batch is {self.batch}, must be >= 1")
