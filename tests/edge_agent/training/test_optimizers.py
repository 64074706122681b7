import numpy as np
import pytest
import torch

from edge_agent.training.optimizers import build_optimizer
from tests.simulators.step_graph import build_training

SIZE = 50


def gradients(count):
    generator = np.random.default_rng(1)
    return [generator.normal(0, 10.0 ** generator.integers(-3, 2), SIZE) for _ in range(count)]


@pytest.mark.parametrize(
    ("plan", "build"),
    [
        ({}, lambda values: torch.optim.SGD(values, 0.1)),
        ({"momentum": "0.9"}, lambda values: torch.optim.SGD(values, 0.1, momentum=0.9)),
        ({"optimizer": "adam"}, lambda values: torch.optim.Adam(values, 0.1)),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_optimizer_steps_as_torch_does_on_the_sum_over_the_expected_batch(plan, build):
    optimizer = build_optimizer(build_training(**plan), SIZE)
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    reference = build([parameter])
    moved = np.zeros(SIZE)
    for gradient in gradients(8):
        total = (10 * gradient).astype(np.float32)  # the expected batch is 10
        optimizer(total)
        moved -= total
        parameter.grad = torch.tensor(gradient)
        reference.step()
    np.testing.assert_allclose(moved, parameter.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_state_begins_anew_with_each_optimizer():
    training = build_training(optimizer="adam")
    first, second = np.ones(SIZE, np.float32), np.ones(SIZE, np.float32)
    optimizer = build_optimizer(training, SIZE)
    optimizer(first)
    optimizer(np.full(SIZE, 7, np.float32))
    build_optimizer(training, SIZE)(second)
    np.testing.assert_array_equal(first, second)
