"""Flower on the coordinator's side: the SuperLink's nodes, and one run at a time.

The only door to flwr in the coordinator.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # flwr reads both while it is imported
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from fl_server.rounds.flower.clients import SessionLostError
from fl_server.rounds.flower.nodes import list_nodes, register_nodes, unregister_nodes, unregister_others
from fl_server.rounds.flower.session import Reply, Session

__all__ = [
    "Reply",
    "Session",
    "SessionLostError",
    "list_nodes",
    "register_nodes",
    "unregister_nodes",
    "unregister_others",
]
