"""What updates in int8 cost and spare: digits learnt in private by eight devices, the same but for the encoding.

Everything is a run's own but the transport: plan and limit, step graph, training, encoding, check and fold. Noise and
draws are seeded, so that both encodings see the same; the accuracy is that of the float network on the test split.
"""

import statistics
from decimal import Decimal
from functools import partial

import numpy as np
import torch

from edge_agent.training.dp_sgd import local_training
from edge_agent.training.step import Step, open_step
from fl_server.demo.demo import DELTA, TRAINING
from fl_server.plan import compute_norm_limit
from fl_server.privacy.calibration import build_privacy_plan
from fl_server.rounds.aggregation import SumFold, check_update, move
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit, Uplink
from models.definitions import digits
from models.tensors.layout import Layout, Vector
from models.tensors.uplink import encode_update
from tests.bench.versions import build_version

SEEDS, DEVICES, ROUNDS, EPSILON = 5, 8, 6, 8


def run() -> dict[str, float]:
    version = build_version("digits")
    assert version.manifest.training is not None
    step, layout = open_step(version.directory, version.manifest), version.manifest.training.layout
    ways: tuple[Uplink, ...] = ("float32", "int8")
    measured = {way: [learn(step, layout, way, seed) for seed in range(SEEDS)] for way in ways}
    accuracies = {way: statistics.mean(accuracy for accuracy, _ in runs) for way, runs in measured.items()}
    sent = {way: sum(size for _, size in runs) for way, runs in measured.items()}
    return {
        "digits_float32_accuracy": accuracies["float32"],
        "digits_int8_accuracy": accuracies["int8"],
        "digits_int8_loss_points": 100 * (accuracies["float32"] - accuracies["int8"]),
        "digits_int8_update_bytes": sent["int8"] / (SEEDS * ROUNDS * DEVICES),
        "digits_int8_to_float32_bytes_ratio": sent["int8"] / sent["float32"],
    }


def learn(step: Step, layout: Layout, uplink: Uplink, seed: int) -> tuple[float, int]:
    """Return the accuracy after all rounds, and the bytes that all updates took."""
    privacy, training = build_plans(uplink)
    limit = float(compute_norm_limit(privacy, training, step.size))
    splits, module, sent = digits.load_splits(DEVICES, seed), _build_module(seed), 0
    parameters = layout.flatten({name: value.detach().numpy() for name, value in module.named_parameters()})
    for number in range(ROUNDS):
        fold = SumFold(step.size)
        for device, samples in enumerate(splits.devices):
            generator = np.random.default_rng((seed, number, device))
            update = local_training(
                step,
                samples.x,
                samples.y,
                parameters,
                privacy,
                training,
                lambda count, deviation, draw=generator.normal: draw(0, deviation, count),
                partial(_draw_poisson, generator),
            )
            data = encode_update(update, uplink, generator)
            received = check_update(data, size=step.size, norm_limit=limit, uplink=uplink)
            assert not isinstance(received, str), received
            fold.add(received)
            sent += len(data)
        parameters = move(parameters, fold.finish(fold.count))
    return _measure(module, layout, parameters, splits.test), sent


def build_plans(uplink: Uplink) -> tuple[PrivacyPlan, TrainingPlan]:
    """Return the demo's plans."""
    steps = int(TRAINING["steps"])
    values = {name: Decimal(str(value)) for name, value in TRAINING.items()}
    privacy = build_privacy_plan(
        unit=Unit.SAMPLE,
        clipping_norm=values["clipping-norm"],
        sampling_rate=values["sampling-rate"],
        delta=Decimal(str(DELTA)),
        epsilon=Decimal(EPSILON),
        steps=steps,
        rounds=ROUNDS,
    )
    training = TrainingPlan(
        rounds=ROUNDS,
        steps=steps,
        expected_batch=values["expected-batch"],
        learning_rate=values["learning-rate"],
        uplink=uplink,
    )
    return privacy, training


def _build_module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return digits.build_module()


def _draw_poisson(generator: np.random.Generator, count: int, rate: Decimal) -> np.ndarray:
    return generator.random(count) < float(rate)


def _measure(module: torch.nn.Module, layout: Layout, parameters: Vector, test: digits.Samples) -> float:
    state = {name: torch.from_numpy(value.copy()) for name, value in layout.unflatten(parameters).items()}
    module.load_state_dict(state, strict=False)
    with torch.no_grad():
        answers = module(torch.from_numpy(test.x)).argmax(1).numpy()
    return float(np.mean(answers == test.y))
