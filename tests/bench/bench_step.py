"""One epoch of private training on a device beside plain torch without any privacy, and beside Opacus.

1000 samples in batches of 64 on one thread, from the loop that devices train with; the time without noise shows
what the noise costs, which is drawn from a cipher under a key of the operating system. Opacus makes the same batches and
draws its ordinary noise, of torch's generator in float32, not that of its secure mode.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from edge_agent.training.dp_sgd import Noise, local_training
from edge_agent.training.step import open_step
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Vector
from models.tensors.noise import draw_gaussian
from tests.bench.first_step import SAMPLES_NAME, prepare_device
from tests.bench.versions import DEFINITIONS, REPOSITORY, SAMPLES, BenchVersion, build_version

BATCH = 64
TURNS = 7
PROCESSES = 3
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # as the agent starts its training
LEARNING_RATE = 0.1
CLIPPING_NORM = 1.0
NAMES = {"digits": "cnn", "mlp": "mlp", "text": "embedding"}

Epoch = Callable[[], object]


def run() -> dict[str, float]:
    figures: dict[str, float] = {}
    with _one_torch_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' hooks on a model whose inputs need no gradient
        for name, short in NAMES.items():
            figures |= measure_epochs(short, build_version(name))
    return figures | measure_processes(build_version("digits"))


def measure_epochs(name: str, version: BenchVersion) -> dict[str, float]:
    """Return what an epoch takes each way, and the ratios."""
    epochs = {
        "private_without_noise": build_private_epoch(version, noise=lambda count, _deviation: np.zeros(count)),
        "private": build_private_epoch(version, noise=draw_gaussian),
        "plain_torch": build_torch_epoch(version),
        "opacus": build_opacus_epoch(version),
    }
    taken: dict[str, list[float]] = {way: [] for way in epochs}
    for epoch in epochs.values():
        epoch()
    for _ in range(TURNS):
        for way, epoch in epochs.items():
            started_s = time.perf_counter()
            epoch()
            taken[way].append(time.perf_counter() - started_s)
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    figures = {f"{name}_{way}_epoch_ms": seconds * 1e3 for way, seconds in medians.items()}
    for way in ("private_without_noise", "private"):
        for other in ("plain_torch", "opacus"):
            figures[f"{name}_{way}_epoch_to_{other}_ratio"] = medians[way] / medians[other]
    return figures


def build_private_epoch(version: BenchVersion, *, noise: Noise) -> Epoch:
    step = open_step(version.directory, version.manifest)
    privacy = PrivacyPlan(
        unit=Unit.SAMPLE,
        clipping_norm=Decimal(CLIPPING_NORM),
        noise_multiplier=Decimal(1),
        sampling_rate=Decimal(BATCH) / SAMPLES,
        delta=Decimal("0.001"),
        epsilon=Decimal(8),
    )
    training = TrainingPlan(
        rounds=1, steps=-(-SAMPLES // BATCH), expected_batch=Decimal(BATCH), learning_rate=Decimal(str(LEARNING_RATE))
    )
    start = (0.1 * np.random.default_rng(0).standard_normal(step.size)).astype(np.float32)

    def epoch() -> Vector:
        batches = _iterate_batches(SAMPLES)
        return local_training(
            step, version.x, version.y, start, privacy, training, noise, lambda _count, _rate: next(batches)
        )

    return epoch


def build_torch_epoch(version: BenchVersion) -> Epoch:
    module = DEFINITIONS[version.manifest.model].build()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    return _build_epoch(module, optimizer, version)


def build_opacus_epoch(version: BenchVersion) -> Epoch:
    module = GradSampleModule(DEFINITIONS[version.manifest.model].build())
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        noise_multiplier=1.0,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=BATCH,
    )
    return _build_epoch(module, optimizer, version)


def _build_epoch(module: nn.Module, optimizer: torch.optim.Optimizer, version: BenchVersion) -> Epoch:
    x, y = torch.from_numpy(version.x), torch.from_numpy(version.y)
    loss_of = nn.CrossEntropyLoss()

    def epoch() -> None:
        for chosen in _iterate_batches(SAMPLES):
            rows = torch.from_numpy(np.flatnonzero(chosen))
            optimizer.zero_grad()
            loss_of(module(x[rows]), y[rows]).backward()
            optimizer.step()

    return epoch


def _iterate_batches(count: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Return masks of one batch each, which together hold every sample once."""
    order = np.random.default_rng(0).permutation(count)
    for start in range(0, count, BATCH):
        mask = np.zeros(count, bool)
        mask[order[start : start + BATCH]] = True
        yield mask


def measure_processes(version: BenchVersion) -> dict[str, float]:
    """Return what a process needs until its first step is done, and its peak memory then.

    A device's opens its ledger and 1000 sealed samples; "joined" has imported what joins the SuperLink as well.
    """
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ("private", "joined", "plain_torch", "opacus")}
    with tempfile.TemporaryDirectory() as scratch:
        prepare_device(Path(scratch), version.x, version.y)
        for turn in range(PROCESSES):
            for way, measured in taken.items():
                device_dir = Path(scratch, f"{way}-{turn}")
                device_dir.mkdir()
                shutil.copyfile(Path(scratch, SAMPLES_NAME), device_dir / SAMPLES_NAME)
                started_s = time.perf_counter()
                command = [sys.executable, "-m", "tests.bench.first_step", way, str(version.directory), str(device_dir)]
                output = subprocess.run(command, cwd=REPOSITORY, env=ONE_THREAD, check=True, capture_output=True).stdout
                measured.append((time.perf_counter() - started_s, json.loads(output)["peak_mb"]))
    figures: dict[str, float] = {}
    for way, measured in taken.items():
        figures[f"first_step_{way}_s"] = statistics.median(seconds for seconds, _ in measured)
        figures[f"first_step_{way}_peak_mb"] = statistics.median(peak for _, peak in measured)
    for other in ("plain_torch", "opacus"):
        for unit, what in (("s", "time"), ("peak_mb", "peak")):
            figures[f"first_step_{what}_to_{other}_ratio"] = (
                figures[f"first_step_private_{unit}"] / figures[f"first_step_{other}_{unit}"]
            )
    return figures


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
