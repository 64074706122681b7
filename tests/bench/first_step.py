"""A process that makes one training step of the digits and ends: `python -m tests.bench.first_step WAY VERSION_DIR`."""

import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np

ROWS = 64


def main() -> None:
    """Do one step in the way named first; print the peak memory of this process."""
    way, directory = sys.argv[1], Path(sys.argv[2])
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 16, (ROWS, 1, 8, 8)).astype(np.float32)
    y = generator.integers(0, 10, ROWS)
    if way == "private":
        step_privately(directory, x, y)
    else:
        step_in_torch(x, y, is_private=way == "opacus")
    print(json.dumps({"peak_mb": read_peak_mb()}))


def read_peak_mb() -> float:
    """Return the largest resident memory so far; `getrusage` would count what this process was forked from."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def step_privately(directory: Path, x: np.ndarray, y: np.ndarray) -> None:
    """As a device does: the graph is verified and measured, the batch is drawn, the noise is the system's."""
    from edge_agent.training.dp_sgd import local_training
    from edge_agent.training.step import open_step
    from models.contract.manifest import MANIFEST_NAME, parse_manifest
    from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
    from models.tensors.noise import draw_gaussian, draw_poisson

    step = open_step(directory, parse_manifest((directory / MANIFEST_NAME).read_bytes()))
    privacy = PrivacyPlan(
        unit=Unit.SAMPLE,
        clipping_norm=Decimal(1),
        noise_multiplier=Decimal(1),
        sampling_rate=Decimal(1),
        delta=Decimal("0.001"),
        epsilon=Decimal(8),
    )
    training = TrainingPlan(rounds=1, steps=1, expected_batch=Decimal(ROWS), learning_rate=Decimal("0.1"))
    start = np.zeros(step.size, np.float32)
    local_training(step, x, y, start, privacy, training, draw_gaussian, draw_poisson)


def step_in_torch(x: np.ndarray, y: np.ndarray, *, is_private: bool) -> None:
    """The same step in torch, with Opacus or without privacy."""
    import torch
    from torch import nn

    from models.definitions import digits

    torch.set_num_threads(1)
    module: nn.Module = digits.build_module()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if is_private:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        module = GradSampleModule(module)
        optimizer = DPOptimizer(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=ROWS)
    nn.CrossEntropyLoss()(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    optimizer.step()


if __name__ == "__main__":
    main()
