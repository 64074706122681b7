"""The engine for a model whose step has no graph: its definition on this device, torch and Opacus's hooks.

The server sends no code. The definition is a file of the device's owner, and it must be the model that the fleet's
offline key signed: its parameters are those of the manifest, and on random data it gives the loss and the outputs of
the signed evaluation graph.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from edge_agent.errors import EngineError
from edge_agent.training.onnx_engine import open_session
from edge_agent.training.sensitivity import random_rows
from models.contract.manifest import EVALUATE_NAME, ModelManifest
from models.definitions.loading import NoDefinitionError, UnusableDefinitionError, load_definition
from models.definitions.losses import SampleLosses, build_sample_losses
from models.definitions.opacus_step import build_opacus_step
from models.tensors.layout import Layout

_Array: TypeAlias = npt.NDArray[Any]
_SAME = 1e-3  # between torch and onnxruntime, relative to the largest value: far below what another layer changes


class OpacusEngine:
    """Runs the step of a definition."""

    def __init__(self, reference: str, manifest: ModelManifest, evaluate_graph: bytes) -> None:
        """Load the definition at `reference`, `FILE.py:NAME`, and compare it with what `manifest` promises.

        Raises:
            EngineError: There is none, it fails, or it is another model.
        """
        assert manifest.training is not None
        layout = manifest.training.layout
        try:
            definition = load_definition(reference)
            module = definition.build().eval()
        except (NoDefinitionError, UnusableDefinitionError) as error:
            raise EngineError(f"federation.definition: {error}") from error
        except Exception as error:  # the owner's code
            raise EngineError(f"federation.definition: build() failed: {type(error).__name__}") from error
        found = [(name, tuple(value.shape)) for name, value in module.named_parameters()]
        expected = list(zip(layout.names, layout.shapes, strict=True))
        if difference := next((pair for pair in zip_longest(found, expected) if pair[0] != pair[1]), None):
            raise EngineError(
                f"federation.definition: {definition.name!r} has parameter {difference[0]} where version "
                f"{manifest.version} of {manifest.model!r} has {difference[1]}"
            )
        self._names = layout.names
        losses = build_sample_losses(definition)
        _check_same(module, losses, manifest, evaluate_graph)
        self._step = build_opacus_step(module, losses)

    def bind(self, inputs: Mapping[str, _Array], outputs: Sequence[_Array]) -> Callable[[], None]:
        """Return what runs the step on these arrays' own memory."""
        feeds = [torch.from_numpy(inputs[name]) for name in ("x", "y", "mask", "clipping_norm", *self._names)]

        def run() -> None:
            for kept, found in zip(outputs, self._step(*feeds), strict=True):
                np.copyto(kept, found.numpy())

        return run


def _check_same(module: torch.nn.Module, losses: SampleLosses, manifest: ModelManifest, evaluate_graph: bytes) -> None:
    """Raise EngineError unless `module` and `losses` compute what `evaluate_graph` does."""
    contract, generator = manifest.training, np.random.default_rng()
    assert contract is not None
    x, y = (random_rows(spec, contract.batch, generator) for spec in (manifest.training_input, contract.target))
    parameters = _draw_parameters(contract.layout, generator)
    mask = np.ones(contract.batch, np.float32)
    session = open_session(evaluate_graph, EVALUATE_NAME)
    try:
        expected = session.run(["loss", "output"], {"x": x, "y": y, "mask": mask, **parameters})
        with torch.no_grad():
            values = {name: torch.tensor(value) for name, value in parameters.items()}
            output = torch.func.functional_call(module, values, (torch.tensor(x),))
            found = (losses(output, torch.tensor(y)).sum(), output)
        is_same = all(_is_close(one.numpy(), other) for one, other in zip(found, expected, strict=True))
    except Exception as error:  # torch's, onnxruntime's, or the owner's code; all data is made up
        raise EngineError(
            f"federation.definition: {type(error).__name__}: {f'{error}'.splitlines()[0]:.200}"
        ) from error
    if not is_same:
        raise EngineError(
            f"federation.definition does not compute what {EVALUATE_NAME} of version {manifest.version} of "
            f"{manifest.model!r} does: it is another model, or has another loss"
        )


def _draw_parameters(layout: Layout, generator: np.random.Generator) -> dict[str, _Array]:
    return {
        name: (0.3 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


def _is_close(one: _Array, other: _Array) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=_SAME * max(1.0, np.abs(other).max()))
