"""Small architectures, one of each kind, exported once for all tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fl_server.packaging.architecture import Architecture
from fl_server.packaging.export import export_architecture
from models.definitions import ModelDefinition, TensorSpec


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens).mean(1))


class Sequence(nn.Module):
    """Three positions of 24 values: so short that the wide layer takes Gram matrices, so long that the narrow does not."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(24, 32), nn.Linear(32, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.narrow(torch.tanh(self.wide(x)))).mean(1))


def build_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))


def build_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(6, 6, 3, padding="same", groups=3),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 1),
    )


def define(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int, **others
) -> ModelDefinition:
    settings = {"loss": "cross_entropy", "metric": "accuracy", "batch": 8, "dtype": "float32"} | others
    dtype = settings.pop("dtype")
    return ModelDefinition(
        name=name,
        build=build,
        inputs=(TensorSpec("features", ("batch", *shape), dtype),),
        outputs=(TensorSpec("logits", ("batch", outputs), "float32"),),
        **settings,
    )


DEFINITIONS = {
    "mlp": define("mlp", build_mlp, (13,), 3),
    "cnn": define("cnn", build_cnn, (2, 10, 10), 1, loss="bce_with_logits", metric="auc"),
    "text": define("text", Text, (7,), 2, dtype="int64"),
    "sequence": define("sequence", Sequence, (3, 24), 2, loss="mse", metric="rmse"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A definition, its export, and its step graph ready to run."""

    definition: ModelDefinition
    architecture: Architecture
    session: ort.InferenceSession = field(repr=False)

    def build_data(self, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        spec, target = self.definition.inputs[0], self.architecture.training.target
        shape = (self.definition.batch, *spec.row_shape)
        x = generator.integers(0, 20, shape) if spec.dtype == "int64" else generator.normal(0, scale, shape)
        if target.dtype == "int64" or self.definition.loss == "bce_with_logits":
            y = generator.integers(0, 2, (len(x), *target.row_shape))
        else:
            y = generator.normal(0, scale, (len(x), *target.row_shape))
        return x.astype(spec.dtype), y.astype(target.dtype)

    def build_parameters(self, seed: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        layout = self.architecture.training.layout
        shapes = zip(layout.names, layout.shapes, strict=True)
        return {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes}

    def run_step(self, x, y, mask, clipping_norm, parameters) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the sums by parameter name and the norms."""
        feeds = {"x": x, "y": y, "mask": np.asarray(mask, np.float32), **parameters}
        *sums, norms = self.session.run(None, feeds | {"clipping_norm": np.array(clipping_norm, np.float32)})
        return dict(zip(self.architecture.training.layout.names, sums, strict=True)), norms


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    directory: Path = tmp_path_factory.mktemp("architectures")
    cache: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in cache:
            architecture = export_architecture(DEFINITIONS[name], directory / name, seed=1)
            session = ort.InferenceSession(architecture.train_step_path, providers=["CPUExecutionProvider"])
            cache[name] = Exported(definition=DEFINITIONS[name], architecture=architecture, session=session)
        return cache[name]

    return get


@pytest.fixture(scope="session", params=list(DEFINITIONS))
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)
