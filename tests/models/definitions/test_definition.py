import pytest
from torch import nn

from models.definitions import ModelDefinition, TensorSpec


def test_loss_that_is_neither_known_nor_a_function_is_named():
    with pytest.raises(ValueError, match=r"'mine': loss 'hinge' is none of cross_entropy, mse, bce_with_logits, nor"):
        ModelDefinition(
            name="mine",
            build=lambda: nn.Linear(4, 2),
            inputs=(TensorSpec("x", ("batch", 4), "float32"),),
            outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
            loss="hinge",
            metric="accuracy",
        )
