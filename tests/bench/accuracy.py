"""What private training is worth: accuracy by epsilon on digits, simulated with the code of real runs, as table and plot.

Eight devices, labels over them by a Dirichlet draw of concentration 1, six rounds, delta 1e-3, unit `sample`; means of
five seeds. The digits network and a linear model of the pixels, each with that learning rate of its grid which does
best on the validation images of the same seeds; what is shown is the accuracy on 300 test images that chose nothing.
The guarantee does not account for the tuning itself.

`python -m tests.bench.accuracy --out DIR` writes `accuracy.md` and `accuracy.png`; it takes ten minutes.
"""

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
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
SEEDS = range(5)
EPSILONS = (1, 2, 3, 5, 8)
LEARNING_RATES = {"digits": (0.06, 0.2, 0.35), "linear": (0.32, 0.64, 1.28)}  # the rest is as in the demo
NAMES = {"digits": "digits network", "linear": "linear model"}


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
    """What one plan is worth: means over the seeds.

    Attributes:
        validation: What the learning rate is chosen by.
        deviation: Of the test accuracies of the seeds.
    """

    model: str
    epsilon: int
    learning_rate: float
    validation: float
    test: float
    deviation: float


class Bench:
    """Both models, exported once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._simulations = {}
        for name, definition in DEFINITIONS.items():
            (directory / name).mkdir()
            architecture = export_architecture(definition, directory / name / "architecture")
            self._simulations[name] = Simulation(definition, architecture, directory / name, lambda _line: None)

    def tune(self, model: str, epsilon: int) -> Point:
        """Return the best of the model's learning rates, by the validation images."""
        points = [self.measure(model, epsilon, rate) for rate in LEARNING_RATES[model]]
        return max(points, key=lambda point: point.validation)

    def measure(self, model: str, epsilon: int, learning_rate: float) -> Point:
        request = TrainRequest(
            model=model,
            epsilon=Decimal(epsilon),
            delta=DELTA,
            sampling_rate=Decimal("0.25"),
            clipping_norm=Decimal(1),
            training=TrainingPlan(
                rounds=ROUNDS, steps=20, expected_batch=Decimal(32), learning_rate=Decimal(str(learning_rate))
            ),
        )
        accuracies = []
        for seed in SEEDS:
            splits = digits.load_splits(DEVICES, seed)
            held_out = {
                name: Samples(path=self._directory, x=samples.x, y=samples.y)
                for name, samples in (("validation", splits.validation), ("test", splits.test))
            }
            result = self._simulations[model].run(request, self._save(splits.devices), held_out, seed=seed)
            accuracies.append(result.per_device)
        validation, test = np.array(accuracies, np.float64).T
        return Point(
            model=model,
            epsilon=epsilon,
            learning_rate=learning_rate,
            validation=float(validation.mean()),
            test=float(test.mean()),
            deviation=float(test.std(ddof=1)),
        )

    def _save(self, devices: Iterable[digits.Samples]) -> Mapping[str, Path]:
        paths = {}
        for number, samples in enumerate(devices):
            paths[f"device-{number:04d}"] = path = self._directory / f"device-{number:04d}.npz"
            np.savez(path, x=samples.x, y=samples.y)
        return paths


def build_table(points: Sequence[Point]) -> str:
    """Return a Markdown table, a line an epsilon."""
    lines = [
        "| epsilon | " + " | ".join(f"{name} | learning rate" for name in NAMES.values()) + " |",
        "| ---: |" + " ---: | ---: |" * len(NAMES),
    ]
    for epsilon in EPSILONS:
        found = {point.model: point for point in points if point.epsilon == epsilon}
        cells = (f"{found[m].test:.3f} ± {found[m].deviation:.3f} | {found[m].learning_rate}" for m in NAMES)
        lines.append(f"| {epsilon} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_plot(points: Sequence[Point], path: Path) -> None:
    """Draw accuracy by epsilon, one curve a model, with the deviations of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for (model, name), style in zip(NAMES.items(), ("o-", "s--"), strict=True):
        curve = [point for point in points if point.model == model]
        axis.errorbar(
            [point.epsilon for point in curve],
            [point.test for point in curve],
            [point.deviation for point in curve],
            fmt=style,
            capsize=3,
            label=name,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(EPSILONS, [str(epsilon) for epsilon in EPSILONS])
    axis.set_xlabel(f"epsilon at delta {DELTA}, unit sample, {DEVICES} devices, {ROUNDS} rounds")
    axis.set_ylabel(f"test accuracy, mean of {len(SEEDS)} seeds")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the table and the plot")
    out_dir = parser.parse_args().out
    points = []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        for epsilon in EPSILONS:
            for model in NAMES:
                points.append(point := bench.tune(model, epsilon))
                print(
                    f"{model} epsilon {epsilon}: {point.test:.4f} on test, {point.validation:.4f} on validation, "
                    f"learning rate {point.learning_rate}",
                    flush=True,
                )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "accuracy.md").write_text(build_table(points))
    save_plot(points, out_dir / "accuracy.png")


if __name__ == "__main__":
    main()
