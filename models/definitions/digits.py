"""Handwritten digits, 8 x 8 pixels of 0 to 16, as scikit-learn ships them; a small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.definitions.definition import ModelDefinition
from models.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

TEST_SAMPLES = 300
VALIDATION_SAMPLES = 200
DEVICE_MIN_SAMPLES = 20
ORIENTATIONS = 8
CHANNELS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Images, shape (n, 1, 8, 8), float32, 0 to 16; and labels, shape (n,), int64."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """The digits, each in exactly one part."""

    test: Samples
    validation: Samples
    devices: tuple[Samples, ...]


def build_module() -> nn.Module:
    """Return the untrained network; it takes raw pixels.

    Fixed oriented edge filters come before the two trained layers: little is left to learn, so little noise is
    needed to hide what was learnt (Tramer & Boneh 2021, arXiv:2011.11660).
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class DigitsNet(nn.Module):
        edges: Tensor

        def __init__(self) -> None:
            super().__init__()
            kernels = torch.from_numpy(_build_edge_kernels())
            self.register_buffer("edges", kernels)
            self.conv = nn.Conv2d(len(kernels), CHANNELS, 3, padding=1)
            self.head = nn.Linear(CHANNELS * 64, 10)
            nn.init.normal_(self.conv.weight, std=2 / (9 * len(kernels)) ** 0.5)
            nn.init.zeros_(self.head.weight)

        def forward(self, image: Tensor) -> Tensor:
            strokes = functional.relu(functional.conv2d(image / 4, self.edges, padding=1))
            logits: Tensor = self.head(torch.tanh(self.conv(strokes)).flatten(1))
            return logits

    return DigitsNet()


def _build_edge_kernels() -> npt.NDArray[np.float32]:
    """Return a Gaussian derivative in each of eight directions, and the pixel itself; shape (9, 1, 3, 3)."""
    v, u = np.mgrid[-1:2, -1:2]
    angles = 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS
    slopes = u * np.cos(angles)[:, None, None] + v * np.sin(angles)[:, None, None]
    kernels = slopes * np.exp(-(u * u + v * v) / (2 * 0.8**2))
    kernels *= 2 / np.abs(kernels).sum((1, 2), keepdims=True)
    pixel = np.zeros((1, 3, 3))
    pixel[0, 1, 1] = 1
    return np.concatenate([kernels, pixel])[:, None].astype(np.float32)


definition = ModelDefinition(
    name="digits",
    build=build_module,
    inputs=(TensorSpec("image", ("batch", 1, 8, 8), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 10), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
    labels=tuple("0123456789"),
)


def load_splits(devices: int, seed: int, alpha: float = 1.0) -> Splits:
    """Return the digits split for a demonstration: every label over the devices by a Dirichlet draw.

    Args:
        devices: How many devices share what is neither test nor validation.
        seed: The same seed gives the same splits.
        alpha: Concentration of the draw; small values give each device few labels.

    Raises:
        ValueError: There are not `DEVICE_MIN_SAMPLES` for each device.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = np.asarray(pixels, np.float32).reshape(-1, 1, 8, 8)
    y = np.asarray(labels, np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(y))
    test, validation, rest = np.split(order, [TEST_SAMPLES, TEST_SAMPLES + VALIDATION_SAMPLES])
    shares = _split_by_label(rest, y, devices, alpha, generator)
    return Splits(
        test=Samples(x=x[test], y=y[test]),
        validation=Samples(x=x[validation], y=y[validation]),
        devices=tuple(Samples(x=x[share], y=y[share]) for share in shares),
    )


def _split_by_label(
    rows: npt.NDArray[np.intp], y: npt.NDArray[np.int64], devices: int, alpha: float, generator: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    if not 1 <= devices <= len(rows) // DEVICE_MIN_SAMPLES:
        raise ValueError(f"{devices} devices: the digits suffice for 1 to {len(rows) // DEVICE_MIN_SAMPLES}")
    parts: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(devices)]
    for label in np.unique(y):
        of_label = rows[y[rows] == label]
        weights = generator.dirichlet([alpha] * devices)
        cuts = (np.cumsum(weights)[:-1] * len(of_label)).astype(int)
        for part, piece in zip(parts, np.split(of_label, cuts), strict=True):
            part.append(piece)
    shares = [np.concatenate(part) for part in parts]
    for device in range(devices):  # a device with too little is filled up from the one that has most
        while len(shares[device]) < DEVICE_MIN_SAMPLES:
            richest = max(range(devices), key=lambda other: len(shares[other]))
            taken = generator.integers(len(shares[richest]))
            shares[device] = np.append(shares[device], shares[richest][taken])
            shares[richest] = np.delete(shares[richest], taken)
    return shares
