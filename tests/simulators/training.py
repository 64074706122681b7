"""A device's side of one training run on disk, and the coordinator's orders for it."""

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_agent.samples.keys import load_key
from edge_agent.training.job import TrainingJob
from models.contract.encoding import build_digest
from models.contract.envelope import TrainOrder, build_envelope
from models.contract.ledger import LedgerHead
from tests.simulators.step_graph import build_privacy, build_training

NOW_S = 1_800_000_000


def build_training_job(directory: Path, **changed) -> TrainingJob:
    values = {
        "device_id": "device-1",
        "fleet": "demo",
        "model": "linear",
        "run": "run-1",
        "graph_dir": str(directory / "version"),
        "coordinator_key_pem": "",
        "superlink": "127.0.0.1:9092",
        "ca_path": str(directory / "ca.pem"),
        "node_key_path": str(directory / "node.pem"),
        "samples_path": str(directory / "samples.db"),
        "samples_key": load_key(directory / "samples.key").hex(),
        "training_dir": str(directory / "training"),
        "poll_interval_s": 0.1,
        "idle_timeout_s": 30.0,
        "epsilon_limit": Decimal(8),
        "total_epsilon_limit": Decimal(16),
        "ledger_copy": LedgerHead(),  # this device has never spent anything
        "delta": Decimal("0.001"),
        "noise_multiplier_limit": Decimal("0.5"),
        **changed,
    }
    return TrainingJob(**values)


@dataclass(kw_only=True)
class Orders:
    """Signs orders as the coordinator does, each with the next sequence number."""

    graph_digest: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    sequence: int = 0

    @property
    def key_pem(self) -> str:
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def build(
        self, number: int, parameters: np.ndarray, *, signer: Ed25519PrivateKey | None = None, **changed
    ) -> bytes:
        """Return the envelope of round `number`."""
        self.sequence += 1
        values = {
            "fleet": "demo",
            "audience": "device-1",
            "sequence": self.sequence,
            "issued_at": NOW_S,
            "expires_at": NOW_S + 60,
            "model": "linear",
            "graph_digest": self.graph_digest,
            "parameters_digest": build_digest(parameters.astype("<f4").tobytes()),
            "run": "run-1",
            "round": number,
            "privacy": build_privacy(),
            "training": build_training(),
            **changed,
        }
        return build_envelope(TrainOrder(**values), signer or self.key)
