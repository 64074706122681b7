"""`python -m edge_agent.simulated`: plays devices of `fl-server simulate` with the code that trains on a real one.

A process of its own, since coordinator and device never import each other. What guards a real device's data is not
here, ledger, limits and stored updates: there is nobody to protect.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.errors import AgentError, StalledError
from edge_agent.training.bounded_sgd import bounded_training
from edge_agent.training.dp_sgd import local_training
from edge_agent.training.local import load_initial
from edge_agent.training.step import Step, open_step
from models.contract.encoding import parse_json
from models.contract.envelope import TrainOrder, open_envelope
from models.contract.errors import ContractError
from models.contract.manifest import MANIFEST_NAME, ModelManifest, parse_manifest
from models.contract.privacy import Unit
from models.contract.simulation import UPDATE_LENGTH_BYTES, SimulationJob, VirtualRound
from models.tensors.layout import Vector, build_vector_bytes, parse_vector_bytes
from models.tensors.noise import Entropy, Keystream, draw_gaussian, draw_poisson
from models.tensors.uplink import encode_update

LINE_MAX_BYTES = 1 << 30  # the coordinator's own words, about 2 kB a device


def main() -> int:
    """Play the job on stdin until it ends; 0, or 1 and one line on stderr."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not pass for an update
        try:
            for update in play(sys.stdin.buffer):
                answers.write(update)
                answers.flush()
        except (AgentError, ContractError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def play(words: BinaryIO) -> Iterator[bytes]:
    """Yield the updates that `words` asks for.

    Raises:
        AgentError: The step does not fit.
        ContractError: An order or document is not one.
        OSError: A file is missing.
    """
    job = parse_json(words.readline(), SimulationJob, max_bytes=LINE_MAX_BYTES)
    manifest = parse_manifest(Path(job.graph_dir, MANIFEST_NAME).read_bytes())
    step = open_step(Path(job.graph_dir), manifest, job.definition)
    assert manifest.training is not None  # the step opened
    device = _Devices(job, step, manifest)
    while line := words.readline():
        asked = parse_json(line, VirtualRound, max_bytes=LINE_MAX_BYTES)
        parameters = parse_vector_bytes(words.read(4 * manifest.training.shared.size))
        for device_id, envelope in asked.envelopes.items():
            update = device.train(device_id, parameters, envelope)
            yield len(update).to_bytes(UPDATE_LENGTH_BYTES, "little") + update


class _Devices:
    """All devices of a job; one is as good as another until it gets its samples."""

    def __init__(self, job: SimulationJob, step: Step, manifest: ModelManifest) -> None:
        assert manifest.training is not None
        self._job, self._step = job, step
        self._target, self._dtype = manifest.training.target, manifest.training_input.dtype
        self._initial = load_initial(Path(job.graph_dir), manifest)
        self._key = Ed25519PublicKey.from_public_bytes(job.coordinator_key)

    def train(self, device_id: str, parameters: Vector, envelope: bytes) -> bytes:
        order = open_envelope(
            envelope, TrainOrder, key=self._key, fleet=self._job.fleet, audience=device_id, now_s=time.time()
        )
        if device_id not in self._job.samples:
            raise StalledError(f"{device_id} has no samples")
        with np.load(self._job.samples[device_id], allow_pickle=False) as arrays:
            x = arrays["x"].astype(self._dtype, copy=False)
            y = arrays["y"].astype(self._target.dtype, copy=False).reshape(-1, *self._target.row_shape)
        entropy = _choose_entropy(self._job.seed, f"{device_id} {order.round}")
        noise, sampler = partial(draw_gaussian, entropy=entropy), partial(draw_poisson, entropy=entropy)
        plans, is_local = (order.privacy, order.training), self._step.is_local
        start = np.empty(self._step.size, np.float32)
        start[is_local], start[~is_local] = self._load_local(device_id), parameters
        if order.privacy.unit is Unit.DEVICE:
            moved = bounded_training(self._step, x, y, start, *plans, sampler)
        else:
            moved = local_training(self._step, x, y, start, *plans, noise, sampler)
        if is_local.any():
            self._get_local_path(device_id).write_bytes(build_vector_bytes((start + moved)[is_local]))
        rounding = np.random.default_rng(int.from_bytes(entropy(16), "little"))
        return encode_update(moved[~is_local], order.training.uplink, rounding)

    def _load_local(self, device_id: str) -> Vector:
        path = self._get_local_path(device_id)
        return parse_vector_bytes(path.read_bytes()) if path.exists() else self._initial

    def _get_local_path(self, device_id: str) -> Path:
        return Path(self._job.local_dir, f"{device_id}.f32")


def _choose_entropy(seed: int | None, purpose: str) -> Entropy:
    """Return the operating system's entropy or, from a seed, bits that anyone who knows it can draw again."""
    return os.urandom if seed is None else Keystream(random.Random(f"{seed} {purpose}").randbytes)


if __name__ == "__main__":
    sys.exit(main())
