"""Architecture: what is exported once and shared by all versions of a model; read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fl_server.errors import UsageError
from models.contract.encoding import build_json, parse_json
from models.contract.errors import MalformedError
from models.contract.files import save_atomically
from models.contract.manifest import EVALUATE_NAME, TRAIN_STEP_NAME, Preference, TrainingContract
from models.definitions import ModelDefinition
from models.definitions.definition import DEFAULT_LOGIT_TOLERANCE
from models.tensors.features import Feature
from models.tensors.layout import Layout
from models.tensors.spec import TensorSpec

ARCHITECTURE_NAME = "architecture.json"
FLOAT_NAME = "float.onnx"
INITIAL_NAME = "initial.safetensors"

Quantization = Literal["static", "dynamic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureDocument:
    """What `architecture.json` says.

    Attributes:
        quantization: "static" int8 with calibrated activations; "dynamic" where embeddings make that larger.
        prefer: The definition's wish, as `ModelDefinition` explains it; so are `logit_tolerance` and `features`.
    """

    schema_version: Literal[1] = 1
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    training: TrainingContract
    quantization: Quantization
    prefer: Preference = "size"
    logit_tolerance: float | None = DEFAULT_LOGIT_TOLERANCE
    features: tuple[Feature, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture(ArchitectureDocument):
    """An exported architecture and the folder it lies in."""

    directory: Path

    @property
    def float_path(self) -> Path:
        """Inference graph in float32, with the initial parameters."""
        return self.directory / FLOAT_NAME

    @property
    def train_step_path(self) -> Path:
        return self.directory / TRAIN_STEP_NAME

    @property
    def evaluate_path(self) -> Path:
        return self.directory / EVALUATE_NAME

    @property
    def graph_paths(self) -> dict[str, Path]:
        """By name, the graphs that devices train and evaluate with."""
        return {name: self.directory / name for name in self.training.graph_names}

    def load_initial_parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the parameters before any training, by name."""
        return load_parameters(self.directory / INITIAL_NAME, self.training.layout)


def load_architecture(directory: Path) -> Architecture:
    """Return the architecture exported to `directory`.

    Raises:
        UsageError: There is none, or its document does not parse.
    """
    try:
        document = parse_json((directory / ARCHITECTURE_NAME).read_bytes(), ArchitectureDocument)
    except (OSError, MalformedError) as error:
        raise UsageError(f"{directory} holds no exported architecture: {error}") from error
    return Architecture(
        directory=directory, **{field.name: getattr(document, field.name) for field in fields(document)}
    )


def update_wishes(architecture: Architecture, definition: ModelDefinition) -> Architecture:
    """Return `architecture` with what `definition` says of it today and no graph depends on; kept in its folder."""
    changed = replace(
        architecture,
        prefer=definition.prefer,
        logit_tolerance=definition.logit_tolerance,
        features=definition.features,
    )
    if changed != architecture:
        kept = {field.name: getattr(changed, field.name) for field in fields(ArchitectureDocument)}
        save_architecture_document(architecture.directory, ArchitectureDocument(**kept))
    return changed


def save_architecture_document(directory: Path, document: ArchitectureDocument) -> None:
    save_atomically(directory / ARCHITECTURE_NAME, build_json(document))


def load_parameters(path: Path, layout: Layout) -> dict[str, npt.NDArray[np.float32]]:
    """Return the parameters in the safetensors file at `path`.

    Raises:
        UsageError: Unreadable, or not the names, shapes and finite float32 values of `layout`.
    """
    try:
        arrays: dict[str, npt.NDArray[np.float32]] = load_file(path)
        check_parameters(arrays, layout)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    return arrays


def check_parameters(parameters: Mapping[str, npt.NDArray[np.float32]], layout: Layout) -> None:
    """Raise ValueError unless `parameters` are finite float32 arrays of `layout`."""
    layout.flatten(parameters)
    for name, array in parameters.items():
        if array.dtype != np.float32:
            raise ValueError(f"parameter {name!r} is {array.dtype}, expected float32")
        if not np.isfinite(array).all():
            raise ValueError(f"parameter {name!r} is not finite")
