"""A node process with a trivial handler: HOST:PORT CA KEY POLL_S IDLE_S BEHAVIOUR RELEASE_PATH [CERT CERT_KEY].

Prints "joined", then "answered ROUND" or "silent ROUND" for each message; "order SEQUENCE" on stderr.
"""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree, PushObjectResponse

from edge_agent.errors import AgentError
from edge_agent.training import node
from models.contract.identity import Identity
from models.tensors.uplink import encode_update


def build_update(behaviour: str, size: int) -> np.ndarray | None:
    if behaviour == "raise":
        raise RuntimeError("secret of a sample: 0.1234")
    updates = {
        "one": np.ones(size, np.float32),
        "two": np.full(size, 2, np.float32),
        "hundred": np.full(size, 100, np.float32),
        "zero": np.zeros(size, np.float32),
        "nan": np.full(size, np.nan, np.float32),
        "infinite": np.full(size, np.inf, np.float32),
        "huge": np.full(size, 1e30, np.float32),
        "held": np.ones(size, np.float32),
    }
    # Its own update: the SuperLink keeps equal records once, and a device need not send what is there.
    hostile = {name: np.full(size, 3 + index, np.float32) for index, name in enumerate((*RECORDS, *TURNS))}
    return {**updates, **hostile}.get(behaviour)


OVERSIZED_BYTES = 48 * 1024 * 1024
RECORDS = {
    "empty": lambda _: ConfigRecord({"update": b""}),
    "short": lambda update: ConfigRecord({"update": update[:-4]}),
    "long": lambda update: ConfigRecord({"update": update + bytes(4)}),
    "double": lambda update: ConfigRecord({"update": np.frombuffer(update, "<f4").astype(np.float64).tobytes()}),
    "text": lambda _: ConfigRecord({"update": "1" * 40}),
    "list": lambda update: ConfigRecord({"update": [update]}),
    "renamed": lambda update: ConfigRecord({"weights": update}),
    "extra": lambda update: ConfigRecord({"update": update, "bias": update}),
    "counting": lambda update: ConfigRecord({"update": update, "num-examples": 10**15}),
    "array": lambda update: ArrayRecord({"update": Array(np.frombuffer(update, "<f4"))}),
    "oversized": lambda _: ConfigRecord({"update": bytes(OVERSIZED_BYTES)}),
}


def tear() -> None:
    """Announce records, and never send them."""
    node.FleetHttpClient.PushObject = lambda *_: PushObjectResponse(stored=True)


def flood() -> None:
    """Send what belongs into a record with the head, where one answer brings the heads of many."""
    node.RecordDict = lambda: RecordDict({"flood": ConfigRecord({"flood": bytes(OVERSIZED_BYTES)})})


def nest() -> None:
    """Hang another record below the update."""
    more = [ObjectTree(object_id="0" * 64)]
    node.ObjectTree = lambda object_id, children=more: ObjectTree(object_id=object_id, children=children)


def pair() -> None:
    """Hang another record beside the update."""
    more = [ObjectTree(object_id="1" * 64)]
    node.ObjectTree = lambda object_id, children=(): ObjectTree(
        object_id=object_id, children=[*children, *(more if children else [])]
    )


TURNS = {"torn": tear, "flooding": flood, "nested": nest, "paired": pair}


def turn_hostile(behaviour: str) -> None:
    """Make this device send what an honest one cannot."""
    if behaviour in RECORDS:
        node._build_record = RECORDS[behaviour]
    elif behaviour in TURNS:
        TURNS[behaviour]()


def main() -> int:
    address, ca, key, poll_s, idle_s, behaviour, release, *shown = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    turn_hostile(behaviour)

    def handle(parameters, envelope):
        order = json.loads(json.loads(envelope)["payload"])
        number = order["round"]
        print("order", order.get("sequence"), file=sys.stderr, flush=True)
        if behaviour == "held":
            print("holding", number, flush=True)
            while not Path(release).exists():
                time.sleep(0.02)
        update = build_update(behaviour, parameters.size)
        print("silent" if update is None else "answered", number, flush=True)
        if update is None:
            return None
        return encode_update(update, order.get("training", {}).get("uplink", "float32"), np.random.default_rng())

    try:
        node.serve(
            superlink=address,
            ca_path=Path(ca),
            node_key_path=Path(key),
            identity=Identity(ca_path=Path(ca), cert_path=Path(shown[0]), key_path=Path(shown[1])) if shown else None,
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
