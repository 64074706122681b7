"""The models that are measured, packaged once as a user would and kept below `build/bench`.

What they answer is worthless, since nothing was trained, but no layer is zero: answers are as long as real ones.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fl_server.package import Data, package_definition, package_file
from fl_server.packaging.export import export_architecture
from fl_server.packaging.graphs import build_with_parameters, load_graph, save_graph
from models.contract.manifest import MANIFEST_NAME, ModelManifest, build_manifest, parse_manifest
from models.definitions import ModelDefinition, TensorSpec, digits

REPOSITORY = Path(__file__).parents[2]
LITERT_DIR = REPOSITORY / "tests" / "data" / "tflite-version"
SAMPLES = 1000
WORDS, LENGTH = 1000, 32  # of the embedding classifier

Array = npt.NDArray[Any]


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(tokens).mean(1))
        return logits


def build_digits(head_std: float = 0.1) -> nn.Module:
    """Return the project's digits network, with a head that has something to say."""
    module = digits.build_module()
    nn.init.normal_(module.head.weight, std=head_std)
    return module


def build_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def build_large() -> nn.Module:
    """Return 1.15 million parameters: 4.6 MB of float32."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 336), nn.ReLU(), nn.Linear(336, 10))


def _define(
    name: str, build: Callable[[], nn.Module], spec: TensorSpec, classes: int, **others: Any
) -> ModelDefinition:
    return ModelDefinition(
        name=name,
        build=build,
        inputs=(spec,),
        outputs=(TensorSpec("logits", ("batch", classes), "float32"),),
        loss="cross_entropy",
        metric="accuracy",
        logit_tolerance=None,
        **others,
    )


_PIXELS = TensorSpec("pixels", ("batch", 784), "float32")
DEFINITIONS = {
    "digits": _define("digits", build_digits, digits.definition.inputs[0], 10),
    "digits_next": _define("digits", lambda: build_digits(0.2), digits.definition.inputs[0], 10),
    "mlp": _define("mlp", build_mlp, _PIXELS, 10),
    "large": _define("large", build_large, _PIXELS, 10),
    "text": _define("text", _Text, TensorSpec("tokens", ("batch", LENGTH), "int64"), 4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchVersion:
    """A packaged model, and inputs for it.

    Attributes:
        directory: Of the version.
        x, y: `SAMPLES` of them.
    """

    directory: Path
    manifest: ModelManifest
    x: Array
    y: Array

    @property
    def input_name(self) -> str:
        return self.manifest.inputs[0].name


def load_litert_version() -> BenchVersion:
    """Return the packaged TFLite model of the tests."""
    manifest = parse_manifest((LITERT_DIR / MANIFEST_NAME).read_bytes())
    (spec,) = manifest.inputs
    x = np.zeros((SAMPLES, *spec.row_shape), spec.numpy_dtype)
    return BenchVersion(directory=LITERT_DIR, manifest=manifest, x=x, y=np.zeros(SAMPLES, np.int64))


def build_version(name: str) -> BenchVersion:
    """Return the model, packaged as int8, the large one as float32; the first time takes some seconds."""
    directory = REPOSITORY / "build" / "bench" / f"{name}-{_compute_state()}"
    definition = DEFINITIONS[name]
    x, y = _build_samples(definition)
    if not (directory / MANIFEST_NAME).exists():
        shutil.rmtree(directory, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            if name == "large":
                _package_float(definition, Path(scratch), directory)
            else:
                _package(definition, x, Path(scratch), directory)
    manifest = parse_manifest((directory / MANIFEST_NAME).read_bytes())
    return BenchVersion(directory=directory, manifest=manifest, x=x, y=y)


def _package(definition: ModelDefinition, x: Array, scratch: Path, directory: Path) -> None:
    np.savez(scratch / "calibration.npz", x=x[:200])
    package_definition(
        definition,
        directory=None,
        parameters_path=None,
        data=Data(calibration_path=scratch / "calibration.npz"),
        tflite=None,
        out_dir=directory,
        say=lambda _text: None,
    )


def _package_float(definition: ModelDefinition, scratch: Path, directory: Path) -> None:
    architecture = export_architecture(definition, scratch / definition.name)
    path = scratch / f"{definition.name}.onnx"
    save_graph(build_with_parameters(load_graph(architecture.float_path), architecture.load_initial_parameters()), path)
    package_file(
        path,
        model=definition.name,
        labels=(),
        directory=None,
        data=Data(),
        out_dir=directory,
        say=lambda _text: None,
    )


def copy_as(version: BenchVersion, number: int, directory: Path) -> Path:
    """Return `directory`, which holds the same version under another number."""
    shutil.copytree(version.directory, directory)
    (directory / MANIFEST_NAME).write_bytes(build_manifest(replace(version.manifest, version=number)))
    return directory


def _build_samples(definition: ModelDefinition) -> tuple[Array, Array]:
    generator = np.random.default_rng(0)
    spec = definition.inputs[0]
    if definition.name == "digits":
        real = digits.load_splits(1, 0).devices[0]
        return real.x[:SAMPLES], real.y[:SAMPLES]
    if spec.dtype == "int64":
        x: Array = generator.integers(0, WORDS, (SAMPLES, *spec.row_shape))
    else:
        x = generator.random((SAMPLES, *spec.row_shape)).astype(np.float32)
    return x, generator.integers(0, definition.outputs[0].row_shape[0], SAMPLES)


def _compute_state() -> str:
    """Return a digest of everything that a packaged version depends on."""
    digest = hashlib.sha256()
    for folder in ("fl_server/packaging", "models", "tests/bench"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if folder != "tests/bench" or path.name == Path(__file__).name:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def feeds(version: BenchVersion, rows: int = 1) -> Mapping[str, Array]:
    """Return inputs of so many rows."""
    return {version.input_name: version.x[:rows]}
