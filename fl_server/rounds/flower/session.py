"""One run, driven by the coordinator itself: it exchanges messages with the nodes through the Runtime API.

A message is a head and below it one record, which the SuperLink keeps by its digest. The parameters are the
same record in all messages of a round, so they travel to the SuperLink once.

    to a device   head {"order": {"envelope": bytes}}, record {"parameters": bytes}
    back          head {}, record {"update": bytes}

Heads alone have no object of their own there: a round costs each device four requests and its driver one.
"""

import logging
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.control_pb2 import StopRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.task_identity import TaskIdentity

from fl_server.rounds.bounded_answers import BoundedAnswers, OversizedError
from fl_server.rounds.flower.clients import SessionLostError, connect_control, connect_runtime, lost_on_error
from fl_server.rounds.flower.opening import open_run
from models.tensors.layout import Vector, build_vector_bytes

_log = logging.getLogger(__name__)

MESSAGES_PER_REQUEST = 64  # bounds one request's heads; records travel one by one
HEAD_MAX_BYTES = 4096  # ten times an honest reply's head
RECORD_OVERHEAD_MAX_BYTES = 1024  # five times what an honest reply's record has around its update
ANSWER_MAX_BYTES = 64 * 1024 * 1024  # what no device decides: 500 bytes a node


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back from one node.

    Attributes:
        update: The bytes it sent; None if it went away or sent something else.
        failure: Why what it sent cannot be read; empty if it went away.
    """

    node_id: int
    update: bytes | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class _Sent:
    """What the messages of the round under way say."""

    parameters: bytes
    envelopes: Mapping[int, bytes]
    lifetime_s: float


class Session:
    """One Flower run, opened and driven from this process; one at a time, since flwr's identity is global."""

    def __init__(self, *, address: str, ca_path: Path, superexec_secret_path: Path, size: int) -> None:
        """Prepare; nothing is opened.

        Args:
            address: HOST:PORT of the SuperLink.
            ca_path: Its certificate authority, PEM.
            superexec_secret_path: The secret with which ServerApp tasks are claimed.
            size: Number of parameters; a reply that is longer than so many is not read.
        """
        self._address, self._ca_path, self._secret_path = address, ca_path, superexec_secret_path
        self._reply_max_bytes = 4 * size + RECORD_OVERHEAD_MAX_BYTES
        self._batch = MESSAGES_PER_REQUEST
        self._asked: dict[str, int] = {}  # node ids by the message that waits for a reply
        self._arriving: list[tuple[int, ObjectTree]] = []  # announced before their records are there
        self._done: list[str] = []  # messages that the SuperLink may forget
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        try:
            with lost_on_error("no run could be opened"):
                self._open()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Stopping is what makes the SuperLink delete all that the run left with it, updates first of all.
            with (
                lost_on_error("the run could not be closed"),
                connect_control(self._address, self._ca_path) as control,
            ):
                control.StopRun(StopRunRequest(run_id=self._run_id))
        except SessionLostError as lost:
            _log.info("%s", lost)
        self._closing.close()

    def list_online(self) -> set[int]:
        """Return the ids of the nodes that are online."""
        with lost_on_error("nodes cannot be listed"):
            return {node.node_id for node in self._client.GetNodes(GetNodesRequest()).nodes}

    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None:
        """Send every node of `envelopes` a train message with `parameters` and its own envelope.

        A message that was not fetched after `lifetime_s` is dropped, and so is its reply.
        """
        self._sent = _Sent(build_vector_bytes(parameters), envelopes, lifetime_s)
        self._send_to(list(envelopes))

    def collect(self) -> Iterator[Reply]:
        """Yield the replies that have come since the last call, one in memory at a time."""
        arriving, self._arriving = self._arriving, []
        for node_id, tree in arriving:
            yield from self._receive(node_id, tree)
        asked = list(self._asked)
        while asked:
            batch, asked = asked[: self._batch], asked[self._batch :]
            try:
                with lost_on_error("replies cannot be fetched"):
                    pulled = self._client.PullMessages(PullAppMessagesRequest(message_ids=batch))
            except OversizedError as error:
                yield from self._part(batch, error)
                continue
            for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                node = self._asked.pop(head.metadata.reply_to_message_id, None)
                if node is not None and head.HasField("error"):
                    yield Reply(node_id=node)
                elif node is not None:
                    yield from self._receive(node, tree)

    def forget(self) -> None:
        """Ignore whatever has not been answered yet, and free what the SuperLink keeps: the round is over."""
        self._asked.clear()
        self._arriving.clear()
        done, self._done = self._done, []
        try:
            for message_id in done:
                with lost_on_error("messages cannot be deleted"):
                    self._client.ConfirmMessageReceived(
                        ConfirmMessageReceivedRequest(node=self._here, message_object_id=message_id)
                    )
        except SessionLostError as lost:
            _log.info("%s", lost)

    def _open(self) -> None:
        token = open_run(self._address, self._ca_path, self._secret_path)
        http = self._closing.enter_context(httpx.Client(verify=ssl.create_default_context(cafile=self._ca_path)))
        interceptors = [RuntimeTokenHttpInterceptor(token=token), BoundedAnswers(http, self._choose_limit)]
        self._client = self._closing.enter_context(
            connect_runtime(self._address, self._ca_path, interceptors, name="flwr-serverapp")
        )
        task = self._client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self._run_id, self._here = task.run.run_id, Node(node_id=SUPERLINK_NODE_ID)
        heartbeat = HeartbeatSender(self._beat)
        heartbeat.start()
        self._closing.callback(heartbeat.stop)

    def _choose_limit(self, request: Any) -> int:
        """Return how long the answer to `request` may be: devices decide only the length of their replies."""
        if isinstance(request, PullAppMessagesRequest):
            return HEAD_MAX_BYTES * len(request.message_ids)
        return self._reply_max_bytes if isinstance(request, PullObjectRequest) else ANSWER_MAX_BYTES

    def _beat(self) -> bool:
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    def _send_to(self, nodes: list[int]) -> None:
        for start in range(0, len(nodes), MESSAGES_PER_REQUEST):
            with lost_on_error("messages cannot be sent"):
                self._push(nodes[start : start + MESSAGES_PER_REQUEST])

    def _push(self, nodes: list[int]) -> None:
        sent = self._sent
        content = ConfigRecord({"parameters": sent.parameters}).deflate()
        record = ObjectTree(object_id=get_object_id(content))
        heads = [_build_head(sent.envelopes[node], node, sent.lifetime_s) for node in nodes]
        ids = [head.metadata.message_id for head in heads]
        pushed = self._client.PushMessages(
            PushAppMessagesRequest(
                messages_list=heads,
                message_object_trees=[ObjectTree(object_id=message_id, children=[record]) for message_id in ids],
            )
        )
        self._done += ids
        if record.object_id in pushed.objects_to_push:
            self._push_object(pushed.session_id, record.object_id, content)
        for message_id, node in zip(pushed.message_ids, nodes, strict=True):
            if message_id:
                self._asked[message_id] = node
            else:
                _log.warning("the SuperLink takes no message for node %d", node)

    def _push_object(self, session_id: str, object_id: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._here, run_id=self._run_id, object_id=object_id, object_content=content, session_id=session_id
        )
        if not self._client.PushObject(request).stored:
            raise SessionLostError("messages cannot be sent: the SuperLink does not take a record")

    def _part(self, message_ids: list[str], error: OversizedError) -> Iterator[Reply]:
        """Ask for each reply alone from now on: one head was too long, and took what came with it."""
        self._batch = 1
        nodes = [self._asked.pop(message_id) for message_id in message_ids]
        if len(nodes) == 1:
            yield Reply(node_id=nodes[0], failure=f"the reply's head is too long: {error}")
        else:
            self._send_to(nodes)

    def _receive(self, node_id: int, tree: ObjectTree) -> Iterator[Reply]:
        """Yield the reply of a node, unless its record is still on its way."""
        if [len(branch.children) for branch in (tree, *tree.children)] != [1, 0]:
            self._done.append(tree.object_id)
            yield Reply(node_id=node_id, failure="the reply holds other than one record")
            return
        request = PullObjectRequest(node=self._here, run_id=self._run_id, object_id=tree.children[0].object_id)
        try:
            with lost_on_error("a reply cannot be fetched"):
                pulled = self._client.PullObject(request)
        except OversizedError as error:
            reply = Reply(node_id=node_id, failure=f"the reply is too long: {error}")
        else:
            if pulled.object_found and not pulled.object_available:
                self._arriving.append((node_id, tree))
                return
            reply = _build_reply(node_id, pulled.object_content) if pulled.object_found else Reply(node_id=node_id)
        # Not before: deleting what its sender has not finished sending breaks the sender.
        self._done.append(tree.object_id)
        yield reply


def _build_head(envelope: bytes, node_id: int, lifetime_s: float) -> Any:
    content = RecordDict({"order": ConfigRecord({"envelope": envelope})})
    message = Message(content, node_id, "train", ttl=lifetime_s)
    head = message_to_proto(message)
    head.metadata.message_id = message.object_id
    return head


def _build_reply(node_id: int, content: bytes) -> Reply:
    """Return the reply in `content`, which a device made and which may be anything."""
    try:
        record = ConfigRecord.inflate(content)
        if set(record) != {"update"}:
            return Reply(node_id=node_id, failure=f"the reply holds {sorted(record)!r:.200}, not ['update']")
        update = record["update"]
    except Exception as error:  # noqa: BLE001 - it concerns nobody else
        return Reply(node_id=node_id, failure=f"the reply cannot be read ({type(error).__name__})")
    if not isinstance(update, bytes):
        return Reply(node_id=node_id, failure=f"the update is {type(update).__name__}, expected bytes")
    return Reply(node_id=node_id, update=update)
