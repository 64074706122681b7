"""What private training is worth: accuracy by epsilon on digits, simulated with the code of real runs.

Eight devices, labels over them by a Dirichlet draw of concentration 1, six rounds, delta 1e-3, unit `sample`; mean of
five seeds on 300 test images. `python -m tests.bench.bench_accuracy --tune` prints, on the validation images of other
seeds, what the learning rates below were chosen by. Those splits are drawn from the same images, so the means are
slightly optimistic; tuning itself is not accounted for.
"""

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from fl_server.jobs import TrainRequest
from fl_server.packaging.export import export_architecture
from fl_server.simulation.data import Samples
from fl_server.simulation.simulate import Simulation
from models.contract.privacy import TrainingPlan
from models.definitions import ModelDefinition, TensorSpec, digits

DEVICES, ROUNDS, DELTA = 8, 6, Decimal("0.001")
SEEDS, TUNING_SEEDS = range(5), range(100, 102)
EPSILONS = (8, 3, 1)
# By epsilon; everything else is as in the demo.
LEARNING_RATES = {
    "digits": {8: 0.35, 3: 0.2, 1: 0.06},
    "linear": {8: 1.28, 3: 0.64, 1: 0.32},
}
TUNING_FACTORS = (0.6, 1.0, 1.6)


def build_linear():
    """Return the baseline: a linear model of the pixels."""
    import torch
    from torch import nn

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)
            nn.init.zeros_(self.head.weight)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.head((image / 16 - 0.3).flatten(1))

    return Linear()


DEFINITIONS = {
    "digits": digits.definition,
    "linear": ModelDefinition(
        name="linear",
        build=build_linear,
        inputs=(TensorSpec("image", ("batch", 1, 8, 8), "float32"),),
        outputs=(TensorSpec("logits", ("batch", 10), "float32"),),
        loss="cross_entropy",
        metric="accuracy",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one plan is worth: accuracies of its seeds."""

    model: str
    epsilon: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


class Bench:
    """Both models, exported once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._simulations = {}
        for name, definition in DEFINITIONS.items():
            (directory / name).mkdir()
            architecture = export_architecture(definition, directory / name / "architecture")
            self._simulations[name] = Simulation(definition, architecture, directory / name, lambda _line: None)

    def measure(
        self, model: str, epsilon: float, *, learning_rate: float, seeds: Iterable[int], tuning: bool = False
    ) -> Point:
        """Return the accuracy after the last round, on the test images; on the validation images for `tuning`."""
        request = TrainRequest(
            model=model,
            epsilon=Decimal(str(epsilon)),
            delta=DELTA,
            sampling_rate=Decimal("0.25"),
            clipping_norm=Decimal(1),
            training=TrainingPlan(
                rounds=ROUNDS, steps=20, expected_batch=Decimal(32), learning_rate=Decimal(str(learning_rate))
            ),
        )
        accuracies = []
        for seed in seeds:
            splits = digits.load_splits(DEVICES, seed)
            held_out = splits.validation if tuning else splits.test
            test = {"held-out": Samples(path=self._directory, x=held_out.x, y=held_out.y)}
            result = self._simulations[model].run(request, self._save(splits.devices), test, seed=seed)
            accuracies.append(result.rounds[-1].metric)
        return Point(model=model, epsilon=epsilon, accuracies=tuple(accuracies))

    def _save(self, devices: Iterable[digits.Samples]) -> Mapping[str, Path]:
        paths = {}
        for number, samples in enumerate(devices):
            paths[f"device-{number:04d}"] = path = self._directory / f"device-{number:04d}.npz"
            np.savez(path, x=samples.x, y=samples.y)
        return paths


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        points = [
            bench.measure(model, epsilon, learning_rate=rates[epsilon], seeds=SEEDS)
            for model, rates in LEARNING_RATES.items()
            for epsilon in EPSILONS
        ]
    return {f"{point.model}_epsilon_{point.epsilon}_accuracy": point.mean for point in points}


def tune(bench: Bench) -> None:
    for model, rates in LEARNING_RATES.items():
        for epsilon, rate in rates.items():
            for factor in TUNING_FACTORS:
                point = bench.measure(
                    model, epsilon, learning_rate=round(rate * factor, 4), seeds=TUNING_SEEDS, tuning=True
                )
                print(f"{model} {epsilon} {rate * factor:.4f} {point.mean:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_accuracy", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="print accuracies by learning rate, on validation images")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        if arguments.tune:
            tune(bench)


if __name__ == "__main__":
    main()
