"""ModelDefinition: all that a user writes to bring a model of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.contract.manifest import Preference
from models.contract.topics import check_name
from models.tensors.features import Feature, check_features
from models.tensors.spec import TRAINING_DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Loss = Literal["cross_entropy", "mse", "bce_with_logits"]
Metric = Literal["accuracy", "auc", "rmse"]

DEFAULT_LOGIT_TOLERANCE = 0.1  # a sound int8 graph of the examples strays by 0.005 to 0.05


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
        features: How columns of raw rows become the input; without them callers send it as the module takes it.
        local: Patterns of parameter names, such as "head.*": each device keeps values of its own of these, which never
            leave it.
        batch: Rows in one run of the training graph.
        prefer: Whether float32 or int8 is packaged: the smaller or, as packaging measures it, the faster of the two.
        logit_tolerance: How far packaged outputs may stray from the module's: mean absolute difference, as a share
            of the outputs' standard deviation. A version beyond it is not packaged; None never checks.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    loss: Loss | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    metric: Metric | Callable[[Any, Any], float]
    labels: tuple[str, ...] = ()
    features: tuple[Feature, ...] = ()
    local: tuple[str, ...] = ()
    batch: int = 64
    prefer: Preference = "size"
    logit_tolerance: float | None = DEFAULT_LOGIT_TOLERANCE

    def __post_init__(self) -> None:
        check_name(self.name, "model")
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise ValueError(f"definition {self.name!r}: one input and one output are supported")
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype not in TRAINING_DTYPES:
                raise ValueError(f"definition {self.name!r}: {spec.name!r} is {spec.dtype}, which cannot be trained on")
        if not callable(self.loss) and self.loss not in get_args(Loss):
            raise ValueError(
                f"definition {self.name!r}: loss {self.loss!r} is none of {', '.join(get_args(Loss))}, nor a function"
            )
        check_features(self.features, self.inputs)
        if self.logit_tolerance is not None and not self.logit_tolerance > 0:
            raise ValueError(
                f"definition {self.name!r}: logit_tolerance is {self.logit_tolerance}, must be > 0 or None"
            )
        if self.batch < 1:
            raise ValueError(f"definition {self.name!r}: batch is {self.batch}, must be >= 1")
        if not isinstance(self.local, tuple):  # a text would be taken for patterns of one letter
            raise ValueError(f"definition {self.name!r}: local is {self.local!r}, must be a tuple of patterns")

    def find_local(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of the module's parameter `names` that are local, in their order.

        Raises:
            ValueError: A pattern fits none of them, or together they fit all.
        """
        for pattern in self.local:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"local: {pattern!r} fits no parameter; there are {', '.join(names)}")
        local = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in self.local))
        if local and local == tuple(names):
            raise ValueError(f"local: {', '.join(map(repr, self.local))} fit all parameters: none would be shared")
        return local
