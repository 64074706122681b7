"""What the device unit is worth: accuracy by epsilon on digits with 1000 devices, simulated with the code of real runs.

Each device holds one or two of the images that are neither test nor validation; a round draws each with probability 0.2,
forty rounds, delta 1e-4, mean of three seeds on 300 test images. `python -m tests.bench.accuracy_of_device_unit --plot F.png`
prints the table and draws it. The learning rates were chosen on the validation images of other seeds (`--tune`), from the
same images, so the means are slightly optimistic; tuning itself is not accounted for. Noise that follows from a seed
protects nobody.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from fl_server.jobs import TrainRequest
from fl_server.packaging.export import export_architecture
from fl_server.rounds.optimizers import ServerOptimizer
from fl_server.simulation.data import Samples
from fl_server.simulation.simulate import Simulation
from models.contract.privacy import TrainingPlan, Unit
from models.definitions import digits

DEVICES, ROUNDS, SAMPLING_RATE, DELTA = 1000, 40, Decimal("0.2"), Decimal("0.0001")
SEEDS, TUNING_SEEDS = range(3), range(100, 101)
SERVER_RATES = {1: 0.2, 3: 0.4, 8: 0.5}  # by epsilon
TUNING_FACTORS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one plan is worth: accuracies of its seeds."""

    epsilon: int
    noise_multiplier: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


class Bench:
    """The model, exported once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        architecture = export_architecture(digits.definition, directory / "architecture")
        self._simulation = Simulation(digits.definition, architecture, directory, lambda _line: None)

    def measure(self, epsilon: int, *, server_rate: float, seeds: Iterable[int], tuning: bool = False) -> Point:
        """Return the accuracy after the last round, on the test images; on the validation images for `tuning`."""
        request = TrainRequest(
            model=digits.definition.name,
            epsilon=Decimal(epsilon),
            delta=DELTA,
            sampling_rate=SAMPLING_RATE,
            clipping_norm=Decimal(1),
            training=TrainingPlan(rounds=ROUNDS, steps=3, expected_batch=Decimal(2), learning_rate=Decimal("0.3")),
            unit=Unit.DEVICE,
            optimizer=ServerOptimizer(name="fedavgm", learning_rate=Decimal(str(server_rate)), momentum=Decimal("0.8")),
        )
        accuracies, noise_multiplier = [], 0.0
        for seed in seeds:
            splits = digits.load_splits(1, seed)
            held_out = splits.validation if tuning else splits.test
            test = {"held-out": Samples(path=self._directory, x=held_out.x, y=held_out.y)}
            result = self._simulation.run(request, self._save(splits.devices[0]), test, seed=seed)
            accuracies.append(result.rounds[-1].metric)
            noise_multiplier = float(result.privacy.noise_multiplier)
        return Point(epsilon=epsilon, noise_multiplier=noise_multiplier, accuracies=tuple(accuracies))

    def _save(self, samples: digits.Samples) -> Mapping[str, Path]:
        paths = {}
        for number in range(DEVICES):
            paths[f"device-{number:04d}"] = path = self._directory / f"device-{number:04d}.npz"
            np.savez(path, x=samples.x[number::DEVICES], y=samples.y[number::DEVICES])
        return paths


def measure_all() -> Iterator[Point]:
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        for epsilon, server_rate in SERVER_RATES.items():
            yield bench.measure(epsilon, server_rate=server_rate, seeds=SEEDS)


def tune() -> None:
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        for epsilon, server_rate in SERVER_RATES.items():
            for factor in TUNING_FACTORS:
                rate = round(server_rate * factor, 4)
                point = bench.measure(epsilon, server_rate=rate, seeds=TUNING_SEEDS, tuning=True)
                print(f"{epsilon} {rate} {point.mean:.4f}", flush=True)


def print_table(points: Iterable[Point]) -> list[Point]:
    """Print each point as soon as it is there, and return them all."""
    print("| epsilon | noise multiplier | accuracy, mean | of each seed |")
    print("| --- | --- | --- | --- |", flush=True)
    printed = []
    for point in points:
        each = ", ".join(f"{accuracy:.3f}" for accuracy in point.accuracies)
        print(f"| {point.epsilon} | {point.noise_multiplier:.4f} | {point.mean:.3f} | {each} |", flush=True)
        printed.append(point)
    return printed


def save_plot(points: Sequence[Point], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    epsilons = [point.epsilon for point in points]
    axes.plot(epsilons, [point.mean for point in points], marker="o", label=f"mean of {len(SEEDS)} seeds")
    for seed in range(len(SEEDS)):
        axes.plot(
            epsilons,
            [point.accuracies[seed] for point in points],
            linestyle="none",
            marker=".",
            color="gray",
            label="each seed" if seed == 0 else None,
        )
    axes.set(
        xscale="log",
        xlabel="epsilon of the whole run, at delta 1e-4",
        ylabel="accuracy on 300 test images",
        title=f"Digits, {DEVICES} devices, unit device, {ROUNDS} rounds",
        ylim=(0, 1),
    )
    axes.set_xticks(epsilons, [str(epsilon) for epsilon in epsilons])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.accuracy_of_device_unit", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="print accuracies by rate, on validation images")
    parser.add_argument("--plot", type=Path, metavar="F.png", help="draw the table")
    arguments = parser.parse_args()
    if arguments.tune:
        tune()
        return
    points = print_table(measure_all())
    if arguments.plot:
        save_plot(points, arguments.plot)


if __name__ == "__main__":
    main()
