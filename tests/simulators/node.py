"""A node process with a trivial handler: HOST:PORT CA KEY POLL_S IDLE_S BEHAVIOUR RELEASE_PATH.

Prints "joined", then "answered ROUND" or "silent ROUND" for each message.
"""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from edge_agent.errors import AgentError
from edge_agent.training import node


def build_update(behaviour: str, size: int) -> np.ndarray | None:
    if behaviour == "raise":
        raise RuntimeError("secret of a sample: 0.1234")
    updates = {
        "one": np.ones(size, np.float32),
        "two": np.full(size, 2, np.float32),
        "zero": np.zeros(size, np.float32),
        "nan": np.full(size, np.nan, np.float32),
        "infinite": np.full(size, np.inf, np.float32),
        "huge": np.full(size, 1e30, np.float32),
        "short": np.ones(1, np.float32),
        "scalar": np.float32(1).reshape(()),
        "matrix": np.ones((size, 1), np.float32),
        "double": np.ones(size, np.float64),
        "integer": np.ones(size, np.int32),
        "held": np.ones(size, np.float32),
    }
    if behaviour in ("torn", "renamed", "extra", "counting"):
        return updates["one"]
    return updates.get(behaviour)


def turn_hostile(behaviour: str) -> None:
    """Make this device send what an honest one cannot."""
    match behaviour:
        case "torn":  # announces its arrays and never sends them
            node.push_objects = lambda *_args, **_options: None
        case "renamed":
            node.ArrayRecord = lambda arrays: ArrayRecord({"weights": arrays["update"]})
        case "extra":
            node.ArrayRecord = lambda arrays: ArrayRecord({**arrays, "bias": arrays["update"]})
        case "counting":
            node.RecordDict = lambda content: RecordDict({**content, "metrics": MetricRecord({"num-examples": 10**15})})


def main() -> int:
    address, ca, key, poll_s, idle_s, behaviour, release = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    turn_hostile(behaviour)

    def handle(parameters, envelope):
        number = json.loads(json.loads(envelope)["payload"])["round"]
        if behaviour == "held":
            print("holding", number, flush=True)
            while not Path(release).exists():
                time.sleep(0.02)
        update = build_update(behaviour, parameters.size)
        print("silent" if update is None else "answered", number, flush=True)
        return update

    try:
        node.serve(
            superlink=address,
            ca_path=Path(ca),
            node_key_path=Path(key),
            poll_interval_s=float(poll_s),
            idle_timeout_s=float(idle_s),
            handle=handle,
            on_joined=lambda: print("joined", flush=True),
        )
    except AgentError as error:
        print("refused", error, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
