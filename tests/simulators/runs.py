"""Specifications of runs that are on disk only."""

from decimal import Decimal

from fl_server.rounds.run import RunSpec
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Layout

LAYOUT = Layout(names=("bias", "weight"), shapes=((2,), (2, 3)))


def build_spec(**changes: object) -> RunSpec:
    values = {
        "fleet": "demo",
        "model": "digits",
        "run": "run-1",
        "graph_digest": "a" * 64,
        "layout": LAYOUT,
        "privacy": PrivacyPlan(
            unit=Unit.SAMPLE,
            clipping_norm=Decimal(1),
            noise_multiplier=Decimal("1.5"),
            sampling_rate=Decimal("0.1"),
            delta=Decimal("0.001"),
            epsilon=Decimal(8),
        ),
        "training": TrainingPlan(rounds=3, steps=10, expected_batch=Decimal(8), learning_rate=Decimal("0.1")),
        "devices": {"device-1": 17319305305751902474, "device-2": 2},
        "quorum": 1,
        "deadline_s": 60.0,
        "join_timeout_s": 30.0,
        "superlink": "127.0.0.1:9092",
        "ca_path": "/ca.pem",
        "superexec_secret_path": "/secret",
        "order_key_path": "/orders.pem",
        "update_norm_limit": Decimal(12),
    }
    return RunSpec(**{**values, **changes})
