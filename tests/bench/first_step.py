"""A process that makes one training step of the digits and ends.

`python -m tests.bench.first_step WAY VERSION_DIR DEVICE_DIR`; what each way does not need, it does not import.
"""

import json
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edge_agent.training.job import TrainingJob
    from models.contract.manifest import ModelManifest

ROWS = 64
KEY = bytes(range(32))
SAMPLES_NAME = "samples.db"

Array = npt.NDArray[Any]


def main() -> None:
    """Do one step in the way named first; print the peak memory of this process."""
    way, version_dir, device_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if way in ("private", "joined"):
        step_privately(version_dir, device_dir, joins=way == "joined")
    else:
        generator = np.random.default_rng(0)
        x = generator.uniform(0, 16, (ROWS, 1, 8, 8)).astype(np.float32)
        step_in_torch(x, generator.integers(0, 10, ROWS), is_private=way == "opacus")
    print(json.dumps({"peak_mb": read_peak_mb()}))


def read_peak_mb() -> float:
    """Return the largest resident memory so far; `getrusage` would count what this process was forked from."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def prepare_device(directory: Path, x: Array, y: Array) -> None:
    """Write to `directory` what a device has before a run: its samples, sealed."""
    from edge_agent.samples.store import open_samples

    with open_samples(directory / SAMPLES_NAME, model="digits", key=KEY) as samples:
        samples.add(list(zip(x, y, strict=True)))


def step_privately(version_dir: Path, device_dir: Path, *, joins: bool) -> None:
    """As a training process does: order, ledger, sealed samples, the graph verified and measured, the system's noise.

    What it lacks without `joins` is Flower, by which the order comes and the update leaves.
    """
    if joins:
        import edge_agent.training.node  # noqa: F401
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edge_agent.samples.cipher import open_cipher
    from edge_agent.samples.store import open_samples
    from edge_agent.training.dp_sgd import local_training
    from edge_agent.training.ledger import open_ledger
    from edge_agent.training.local import LocalParameters, load_initial
    from edge_agent.training.session import TrainingSession
    from edge_agent.training.step import open_step
    from edge_agent.training.updates import UpdateStore
    from models.contract.ledger import LedgerHead
    from models.contract.manifest import MANIFEST_NAME, parse_manifest
    from models.tensors.noise import draw_gaussian, draw_poisson

    manifest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes())
    assert manifest.training is not None
    target = manifest.training.target
    step = open_step(version_dir, manifest)
    key = Ed25519PrivateKey.generate()
    parameters = np.zeros(step.size, np.float32)
    job, envelope = build_order(manifest, version_dir, device_dir, key, parameters)
    with (
        open_ledger(device_dir / "ledger.jsonl") as ledger,
        open_samples(device_dir / SAMPLES_NAME, model=manifest.model, key=KEY) as samples,
    ):
        ledger.restore(LedgerHead(), job.delta, at=0)
        session = TrainingSession(
            job=job,
            graph_digest=manifest.step_digest,
            size=step.size,
            key=key.public_key(),
            ledger=ledger,
            updates=UpdateStore(device_dir / "updates"),
            local=LocalParameters(device_dir, manifest, load_initial(version_dir, manifest), open_cipher(KEY)),
            train=lambda start, privacy, training: local_training(
                step,
                *samples.load(manifest.training_input, target),
                start,
                privacy,
                training,
                draw_gaussian,
                draw_poisson,
            ),
            report=lambda _event: None,
        )
        assert session.handle(parameters, envelope) is not None


def build_order(
    manifest: "ModelManifest", version_dir: Path, device_dir: Path, key: "Ed25519PrivateKey", parameters: Array
) -> "tuple[TrainingJob, bytes]":
    """Return a job, and the order of its first round, of one step."""
    from edge_agent.training.job import TrainingJob
    from models.contract.encoding import build_digest
    from models.contract.envelope import TrainOrder, build_envelope
    from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit

    privacy = PrivacyPlan(
        unit=Unit.SAMPLE,
        clipping_norm=Decimal(1),
        noise_multiplier=Decimal(1),
        sampling_rate=Decimal("0.064"),  # a batch of the graph's, of 1000 samples
        delta=Decimal("0.001"),
        epsilon=Decimal(8),
    )
    job = TrainingJob(
        device_id="device-1",
        fleet="bench",
        model=manifest.model,
        run="run-1",
        graph_dir=str(version_dir),
        coordinator_key_pem="",
        superlink="127.0.0.1:9092",
        ca_path="",
        node_key_path="",
        samples_path=str(device_dir / SAMPLES_NAME),
        samples_key=KEY.hex(),
        training_dir=str(device_dir),
        poll_interval_s=0.2,
        idle_timeout_s=60.0,
        epsilon_limit=Decimal(100),
        total_epsilon_limit=Decimal(100),
        delta=privacy.delta,
        noise_multiplier_limit=Decimal(0),
    )
    order = TrainOrder(
        fleet=job.fleet,
        audience=job.device_id,
        sequence=1,
        issued_at=int(time.time()),
        expires_at=int(time.time()) + 60,
        model=job.model,
        graph_digest=manifest.step_digest,
        parameters_digest=build_digest(parameters.tobytes()),
        run=job.run,
        round=1,
        privacy=privacy,
        training=TrainingPlan(rounds=1, steps=1, expected_batch=Decimal(ROWS), learning_rate=Decimal("0.1")),
    )
    return job, build_envelope(order, key)


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
