"""The definition of `tflite-version/`: a small network with all that makes an export hard, axes that move among it."""

import torch
from torch import nn

from models.definitions import ModelDefinition, TensorSpec


class Strokes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(image / 4)).flatten(1))


definition = ModelDefinition(
    name="strokes",
    build=Strokes,
    inputs=(TensorSpec("image", ("batch", 1, 8, 8), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 10), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
    labels=tuple("0123456789"),
)
