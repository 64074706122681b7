"""What a device fetches from one version to the next: an MLP of 167 300 weights after a round of noised updates.

The next version is the champion plus the mean of a cohort's updates, each clipped to norm 1, and noise of multiplier 1
on their sum, as the device unit draws it. The champion has learnt digits, blown up to 28 x 28, and both versions are
packaged as a coordinator does; the updates are drawn, since the noise is what moves the weights. The floors are those of the same pair of versions, the next one calibrated anew: its file,
that file in zstd-19, zstd-19 with the champion's file as the dictionary, and, where it is installed, bsdiff4.
"""

import contextlib
import importlib
import tempfile
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import nn

from fl_server.packaging.architecture import Architecture
from fl_server.packaging.export import export_architecture
from fl_server.packaging.graphs import build_with_parameters, load_graph
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.quantize import quantize
from models.contract.manifest import Figures, Lineage, ModelManifest
from models.definitions import ModelDefinition, TensorSpec, digits

COHORTS = (20, 1000, 10_000)
CLIPPING_NORM = NOISE_MULTIPLIER = 1.0
EPOCHS = 10

Rows = npt.NDArray[np.float32]
Parameters = Mapping[str, Rows]


def run() -> dict[str, float]:
    torch.manual_seed(0)
    definition = ModelDefinition(
        name="mlp",
        build=lambda: nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 50), nn.ReLU(), nn.Linear(50, 10)),
        inputs=(TensorSpec("pixels", ("batch", 784), "float32"),),
        outputs=(TensorSpec("logits", ("batch", 10), "float32"),),
        loss="cross_entropy",
        metric="accuracy",
    )
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        architecture = export_architecture(definition, Path(scratch, "mlp"))
        parameters, rows = _learn(definition)
        champion_dir = Path(scratch, "champion")
        _package(architecture, parameters, rows, champion_dir, running=())
        before = _quantize(architecture, parameters, rows, Path(scratch, "before.onnx"))
        for cohort in COHORTS:
            later = _advance(parameters, cohort)
            out_dir = Path(scratch, f"after-{cohort}")
            manifest = _package(architecture, later, rows, out_dir, running=(champion_dir,))
            after = _quantize(architecture, later, rows, Path(scratch, "after.onnx"))
            figures |= {f"cohort_{cohort}_{name}": size for name, size in _compare(before, after, manifest).items()}
    return figures


def _learn(definition: ModelDefinition) -> tuple[Parameters, Rows]:
    """Return what the model has learnt, and inputs to calibrate on."""
    splits = digits.load_splits(1, seed=0)
    x, y = torch.from_numpy(_blow_up(splits.devices[0].x)), torch.from_numpy(splits.devices[0].y)
    module = definition.build()
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    return {name: value.detach().numpy() for name, value in module.named_parameters()}, _blow_up(splits.validation.x)


def _blow_up(images: npt.NDArray[np.float32]) -> Rows:
    large = np.kron(images.reshape(-1, 8, 8) / 16, np.ones((1, 3, 3)))
    return np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784).astype(np.float32)


def _advance(parameters: Parameters, cohort: int) -> Parameters:
    generator = np.random.default_rng(cohort)
    size = sum(array.size for array in parameters.values())
    moved = {}
    for name, array in parameters.items():
        signal = generator.normal(0, CLIPPING_NORM / np.sqrt(size * cohort), array.shape)
        noise = generator.normal(0, NOISE_MULTIPLIER * CLIPPING_NORM / cohort, array.shape)
        moved[name] = (array + signal + noise).astype(np.float32)
    return moved


def _package(
    architecture: Architecture, parameters: Parameters, rows: Rows, out_dir: Path, running: tuple[Path, ...]
) -> ModelManifest:
    return package_version(
        architecture,
        parameters=parameters,
        version=1 + len(running),
        calibration=rows,
        tools=Tools(measure=lambda *_: None, measure_figures=_measure_size, running=running),
        lineage=Lineage(),
        privacy=None,
        out_dir=out_dir,
    )


def _quantize(architecture: Architecture, parameters: Parameters, rows: Rows, path: Path) -> bytes:
    """Return the int8 file with its weights inside, in scales of its own."""
    graph = build_with_parameters(load_graph(architecture.float_path), parameters)
    quantize(graph, rows, architecture.quantization, path)
    return path.read_bytes()


def _compare(before: bytes, after: bytes, manifest: ModelManifest) -> dict[str, float]:
    deltas = [delta.file.size_bytes for delta in manifest.deltas]
    zstd = len(zstandard.ZstdCompressor(level=19).compress(after))
    base = zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    sizes: dict[str, float] = {
        "full_bytes": len(after),
        "zstd_bytes": zstd,
        "zstd_patch_bytes": len(zstandard.ZstdCompressor(level=19, dict_data=base).compress(after)),
        "delta_bytes": deltas[0] if deltas else sum(manifest.files[name].size_bytes for name in manifest.serving_names),
        "template_kept": len(deltas),
    }
    with contextlib.suppress(ModuleNotFoundError):
        sizes["bsdiff4_bytes"] = len(importlib.import_module("bsdiff4").diff(before, after))
    return sizes | {"delta_to_zstd_ratio": sizes["delta_bytes"] / zstd}


def _measure_size(path: Path, _rows: object) -> Figures:
    return Figures(size_bytes=path.stat().st_size, row_us=Decimal(1), batch_us=Decimal(1))
