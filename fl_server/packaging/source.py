"""A definition's module with examples to trace and check it with."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_server.errors import DefinitionError, ServerError
from fl_server.packaging.step_check import check_module, check_rows, check_step
from fl_server.packaging.training_step import derive_training_step
from models.definitions import ModelDefinition, TensorSpec
from models.definitions.losses import SampleLosses, build_sample_losses, build_target_spec
from models.definitions.substitutes import Step

_DOES_NOT_RUN = "the module does not run on its own inputs"
_SPREAD = 0.1  # of random parameters around the initial ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A definition's module with what every export of it needs.

    Attributes:
        module: With the initial parameters.
        target: What y looks like.
        x: Random inputs, one batch; y: fitting targets.
        parameters: Random ones by name, to trace and check with: initial zeros would hide what is wrong.
    """

    definition: ModelDefinition
    module: nn.Module
    losses: SampleLosses
    target: TensorSpec
    x: Tensor
    y: Tensor
    parameters: dict[str, Tensor]

    @property
    def initial_parameters(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.module.named_parameters()}


def load_source(definition: ModelDefinition) -> Source:
    """Return the definition's module, freshly built with torch's random generator, and examples for it.

    Raises:
        DefinitionError: `build` fails.
    """
    torch.backends.mha.set_fastpath_enabled(value=False)  # it has neither a backward pass nor a translation
    try:
        module = definition.build().eval()
    except Exception as error:
        raise DefinitionError(f"build() failed: {say(error)}") from error
    target = build_target_spec(definition)
    return Source(
        definition=definition,
        module=module,
        losses=build_sample_losses(definition),
        target=target,
        x=_example(definition.inputs[0], definition.batch, module),
        y=_example_target(definition, target),
        parameters={
            name: value.detach() + _SPREAD * torch.randn_like(value) for name, value in module.named_parameters()
        },
    )


def derive_step(source: Source) -> tuple[Step, str | None]:
    """Run module and loss once, so that a mistake is named before the long export, and derive the training step.

    Returns:
        The step, and why it takes one gradient a sample, if it does.

    Raises:
        DefinitionError: They fail, or do not give what the definition says.
    """
    _check_runs(source)
    with _blamed(_DOES_NOT_RUN):
        return derive_training_step(source.module, source.losses, source.x, source.y, source.parameters)


def check_opacus_step(source: Source) -> None:
    """Raise DefinitionError unless Opacus takes the clipped sums of the module as one backward pass a sample does."""
    _check_runs(source)
    with _blamed("Opacus has no gradients of each sample"):
        from models.definitions.opacus_step import build_opacus_step  # which takes a second to import

        check_rows(source.module, source.x, source.parameters)
        step = build_opacus_step(source.module, source.losses)
        check_step(source.module, step, source.losses, source.x, source.y, source.parameters)


def _check_runs(source: Source) -> None:
    """Raise DefinitionError unless module and loss can be trained privately and give what the definition says."""
    check_module(source.module)
    spec = source.definition.outputs[0]
    expected = (source.definition.batch, *spec.row_shape)
    with _blamed(_DOES_NOT_RUN):
        output = source.module(source.x)
        if not isinstance(output, Tensor):
            raise DefinitionError(
                f"the module itself ({type(source.module).__name__}) returns a {type(output).__name__}, "
                "expected one tensor"
            )
        if tuple(output.shape) != expected or output.dtype != getattr(torch, spec.dtype):
            raise DefinitionError(
                f"output {spec.name!r} is {output.dtype} of shape {tuple(output.shape)}, "
                f"the definition says {spec.dtype} of shape {expected}"
            )
        losses = source.losses(output, source.y)
        if callable(source.definition.loss):
            whole = source.definition.loss(output, source.y)
            if not torch.allclose(whole, losses.sum(), rtol=1e-3):
                raise DefinitionError("the loss is not the sum of the losses of the rows; reduce by sum, not by mean")


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Turn what the author's code raises, and torch on it, into a DefinitionError that begins with `what`."""
    try:
        yield
    except ServerError:
        raise
    except Exception as error:
        raise DefinitionError(f"{what}: {say(error)}") from error


def say(error: Exception) -> str:
    """Return one line: the innermost cause, which is what the author can act on."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"


def _example(spec: TensorSpec, batch: int, module: nn.Module) -> Tensor:
    shape = (batch, *spec.row_shape)
    if spec.dtype.startswith("float"):
        return torch.rand(shape, dtype=getattr(torch, spec.dtype))
    sizes = [layer.num_embeddings for layer in module.modules() if isinstance(layer, nn.Embedding)]
    return torch.randint(0, min(sizes, default=2), shape).to(getattr(torch, spec.dtype))


def _example_target(definition: ModelDefinition, target: TensorSpec) -> Tensor:
    shape = (definition.batch, *target.row_shape)
    if target.dtype == "int64":
        return torch.randint(0, definition.outputs[0].row_shape[0] if definition.outputs[0].row_shape else 2, shape)
    if definition.loss == "bce_with_logits":
        return torch.randint(0, 2, shape).to(torch.float32)
    return torch.randn(shape)
