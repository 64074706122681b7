"""Each rule beside the one that was published: PyTorch's where it has it, else the paper's formula, value by value."""

import math
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
import torch

from fl_server.rounds.optimizers import OptimizerName, ServerOptimizer, begin_moments, take_step

STEPS = np.random.default_rng(0).normal(0, 0.3, (6, 5))
RATE, MOMENTUM, DECAY, TAU = 0.5, 0.9, 0.99, 1e-3


def walk(name: OptimizerName, *, momentum: float = 0) -> np.ndarray:
    """Return where all steps lead from zero, shape (6, 5)."""
    optimizer = ServerOptimizer(name=name, learning_rate=Decimal(str(RATE)), momentum=Decimal(str(momentum)))
    moments, place, places = begin_moments(optimizer, 5), np.zeros(5), []
    for step in STEPS:
        moved, moments = take_step(optimizer, moments, step.copy())
        place = place + moved
        places.append(place)
    return np.array(places)


def walk_with_torch(build: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> np.ndarray:
    place = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer, places = build([place]), []
    for step in STEPS:
        place.grad = -torch.from_numpy(step)
        optimizer.step()
        places.append(place.detach().numpy().copy())
    return np.array(places)


def test_fedavg_is_the_step_itself() -> None:
    np.testing.assert_allclose(walk("fedavg"), RATE * STEPS.cumsum(axis=0))


def test_fedavgm_is_sgd_with_momentum_as_pytorch_has_it() -> None:
    expected = walk_with_torch(lambda place: torch.optim.SGD(place, lr=RATE, momentum=MOMENTUM))
    np.testing.assert_allclose(walk("fedavgm", momentum=MOMENTUM), expected)


def test_fedadagrad_is_adagrad_as_pytorch_has_it() -> None:
    expected = walk_with_torch(
        lambda place: torch.optim.Adagrad(place, lr=RATE, initial_accumulator_value=TAU**2, eps=TAU)
    )
    np.testing.assert_allclose(walk("fedadagrad"), expected)


def follow_adam(second: float, square: float) -> float:
    return DECAY * second + (1 - DECAY) * square


def follow_yogi(second: float, square: float) -> float:
    return second - (1 - DECAY) * square * ((second > square) - (second < square))


@pytest.mark.parametrize(("name", "follow"), [("fedadam", follow_adam), ("fedyogi", follow_yogi)])
def test_fedadam_and_fedyogi_follow_algorithm_2_of_reddi_et_al(
    name: OptimizerName, follow: Callable[[float, float], float]
) -> None:
    places = walk(name, momentum=MOMENTUM)
    for column in range(5):
        place, first, second = 0.0, 0.0, TAU**2
        for number, step in enumerate(STEPS[:, column]):
            first = MOMENTUM * first + (1 - MOMENTUM) * step
            second = follow(second, float(step) ** 2)
            place += RATE * first / (math.sqrt(second) + TAU)
            assert places[number, column] == pytest.approx(place)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "adam"}, "must be one of fedavg, fedavgm"),
        ({"name": "fedadam", "learning_rate": Decimal(0)}, "learning rate is 0"),
        ({"name": "fedavgm", "momentum": Decimal(1)}, r"momentum is 1, must be in \[0, 1\)"),
        ({"momentum": Decimal("0.9")}, "use fedavgm"),
    ],
)
def test_optimizer_that_makes_no_sense_is_refused_in_words(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerOptimizer(**values)
