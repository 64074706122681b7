"""A run's devices on Flower's own simulation engine: Ray actors on this machine or a cluster, without a SuperLink.

Needs the extra `simulation`. The driver is the ServerApp, and a virtual device the ClientApp, which hands what it was
sent to `train`; an engine's nodes are told apart by the order of their ids.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fl_server.errors import RunError
from fl_server.rounds.flower.session import Reply
from models.tensors.layout import Vector, build_vector_bytes

# Device id, envelope, parameters as float32 -> update as it travels. Goes to the actors, so it is picklable.
Train: TypeAlias = Callable[[str, bytes, bytes], bytes]

POLL_S = 0.05
ONE_CPU = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"include_dashboard": False}}


def run_on_engine(devices: Sequence[str], train: Train, drive: Callable[["GridExchange"], None]) -> None:
    """Run `drive` as the ServerApp of as many virtual nodes as there are `devices`.

    Raises:
        RunError: As `drive`, or the engine ended without running it.
    """
    failures: list[BaseException] = []
    client, server = ClientApp(), ServerApp()

    def answer(message: Message, _context: Context) -> Message:
        order = message.content["order"]
        update = train(order["device"], order["envelope"], order["parameters"])
        return Message(RecordDict({"reply": ConfigRecord({"update": update})}), reply_to=message)

    def main(grid: Grid, _context: Context) -> None:
        try:
            drive(GridExchange(grid, devices))
            failures.append(_DoneError())
        except BaseException as error:  # noqa: BLE001 - is raised again below, out of the engine's thread
            failures.append(error)

    client.train()(answer)
    server.main()(main)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(server, client, num_supernodes=len(devices), backend_config=ONE_CPU)
    if not failures:
        raise RunError("Flower's simulation engine ended before the run began")
    if not isinstance(failures[0], _DoneError):
        raise failures[0]


class _DoneError(Exception):
    """All went well."""


class GridExchange:
    """The nodes of an engine, as the round driver sees them: node `i` is the i-th device."""

    def __init__(self, grid: Any, devices: Sequence[str]) -> None:
        self._grid, self._devices = grid, devices
        self._nodes: list[int] = []
        self._asked: dict[str, int] = {}

    def list_online(self) -> set[int]:
        """Return the devices whose nodes the engine has registered."""
        self._nodes = sorted(self._grid.get_node_ids())
        return set(range(len(self._nodes)))

    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None:
        """Send every device of `envelopes` its own, and `parameters`."""
        data = build_vector_bytes(parameters)
        messages = [
            Message(
                RecordDict(
                    {"order": ConfigRecord({"device": self._devices[i], "envelope": envelope, "parameters": data})}
                ),
                self._nodes[i],
                "train",
                ttl=lifetime_s,
            )
            for i, envelope in envelopes.items()
        ]
        self._asked = dict(zip(self._grid.push_messages(messages), envelopes, strict=True))

    def collect(self) -> Iterator[Reply]:
        """Yield every reply in the order of the devices: a sum of floats depends on it."""
        replies: dict[int, Reply] = {}
        while len(replies) < len(self._asked):
            for message in self._grid.pull_messages(self._asked):
                node = self._asked[message.metadata.reply_to_message_id]
                replies[node] = _read(node, message)
            time.sleep(POLL_S)
        yield from (replies[node] for node in sorted(replies))

    def forget(self) -> None:
        """Expect nothing any more."""
        self._asked = {}


def _read(node: int, message: Any) -> Reply:
    if message.has_error():
        return Reply(node_id=node, failure=f"the engine says: {message.error.reason!s:.300}")
    return Reply(node_id=node, update=message.content["reply"]["update"])
