"""Flower on the coordinator's side: the SuperLink's command line, its nodes, and one run at a time.

The only door to flwr in the coordinator. The coordinator itself drives the run: it opens it through the
Control API, claims its ServerApp task and exchanges messages through the Runtime API. The app bundle
that Flower wants for a run is empty, and no device ever fetches it.
"""

import fcntl
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # flwr reads both while it is imported
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import httpx
import numpy.typing as npt
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    push_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fl_server.errors import RunError
from models.tensors.layout import Vector

_log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S, RETRY_TOTAL_S = 0.1, 1.0, 5.0
CLAIM_MAX_S = 10.0
MESSAGES_PER_REQUEST = 64  # bounds one request's heads; arrays travel one by one
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_FAB_FILES: dict[str, bytes | Path] = {
    "pyproject.toml": b"""[project]
name = "edge-fl-rounds"
version = "1.0.0"
description = "Marks a run; holds no code that anything runs"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "edge-fl"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
""",
    "nothing.py": b'"""Left empty: devices run what was installed on them."""\n',
}


class SessionLostError(RunError):
    """The SuperLink went away or no longer knows the run: open another session and ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinkCommand:
    """How to start the SuperLink; `environment` is added to the parent's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back from one node.

    Attributes:
        arrays: By name, as the device sent them; None if it went away or sent something else.
        failure: Why what it sent cannot be read; empty if it went away.
    """

    node_id: int
    arrays: Mapping[str, npt.NDArray[Any]] | None = None
    failure: str = ""


def superlink_command(
    *,
    host: str,
    port: int,
    database_path: Path,
    ca_path: Path,
    certificate_path: Path,
    key_path: Path,
    superexec_secret_path: Path,
) -> SuperLinkCommand:
    """Return how to start a SuperLink that only registered nodes can use and that runs nobody's code.

    Its Control API has no authentication: listen on loopback, or pass on `/v1/fleet/` alone.
    """
    return SuperLinkCommand(
        arguments=(
            str(Path(sys.executable).with_name("flower-superlink")),
            *("--host", host, "--port", str(port)),
            *("--ssl-ca-certfile", str(ca_path), "--ssl-certfile", str(certificate_path)),
            *("--ssl-keyfile", str(key_path)),
            *("--database", str(database_path)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--isolation", "process", "--superexec-auth-secret-file", str(superexec_secret_path)),
        ),
        environment={
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(database_path.parent / "home"),
        },
    )


def list_nodes(address: str, ca_path: Path) -> dict[bytes, int]:
    """Return the registered nodes' ids by public key, PEM.

    Raises:
        SessionLostError: The SuperLink at `address` does not answer.
    """
    with _lost_on_error("nodes cannot be listed"), _connect_control(address, ca_path) as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in nodes if not node.unregistered_at}


def register_nodes(address: str, ca_path: Path, public_keys: Mapping[str, bytes]) -> dict[str, int]:
    """Register the devices that are not yet, and return all their node ids by device id.

    Args:
        address: HOST:PORT of the SuperLink.
        ca_path: Its certificate authority, PEM.
        public_keys: NIST-curve public keys by device id, PEM or OpenSSH.

    Raises:
        SessionLostError: The SuperLink does not answer, or refuses a key.
        ValueError: A key cannot be read.
    """
    known = list_nodes(address, ca_path)
    node_ids = {}
    with _lost_on_error("nodes cannot be registered"), _connect_control(address, ca_path) as control:
        for device_id, key in public_keys.items():
            pem = _convert_to_pem(key)
            if pem not in known:
                known[pem] = control.RegisterNode(RegisterNodeRequest(public_key=pem, name=device_id)).node_id
            node_ids[device_id] = known[pem]
    return node_ids


def unregister_nodes(address: str, ca_path: Path, node_ids: Iterable[int]) -> None:
    """Exclude nodes from now on; those that are not registered are left alone.

    Raises:
        SessionLostError: The SuperLink at `address` does not answer.
    """
    registered = set(list_nodes(address, ca_path).values())
    with _lost_on_error("nodes cannot be unregistered"), _connect_control(address, ca_path) as control:
        for node_id in registered.intersection(node_ids):
            control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def _convert_to_pem(key: bytes) -> bytes:
    public_key = load_pem_public_key(key) if key.lstrip().startswith(b"-----") else load_ssh_public_key(key)
    return public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _connect_control(address: str, ca_path: Path) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=ca_path.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        retry_invoker=_build_retries(),
    )


def _build_retries() -> RetryInvoker:
    return RetryInvoker(
        lambda: exponential(base_delay=RETRY_FIRST_S, max_delay=RETRY_MAX_S),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=RETRY_TOTAL_S,
        should_giveup=lambda error: isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500,
    )


@contextmanager
def _lost_on_error(what: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise SessionLostError(f"{what}: the SuperLink answered HTTP {error.response.status_code}") from error
    except (httpx.HTTPError, ObjectPushError) as error:
        raise SessionLostError(f"{what}: {error or type(error).__name__}") from error


class Session:
    """One Flower run, opened and driven from this process; one at a time, since flwr's identity is global."""

    def __init__(self, *, address: str, ca_path: Path, superexec_secret_path: Path) -> None:
        self._address, self._ca_path, self._secret_path = address, ca_path, superexec_secret_path
        self._asked: dict[str, int] = {}  # node ids by the message that waits for a reply
        self._arriving: list[tuple[int, ObjectTree]] = []  # replies announced before their arrays are there
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        try:
            with _lost_on_error("no run could be opened"):
                self._open()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = SubStatus.COMPLETED if kind is None else SubStatus.FAILED
        try:
            with _lost_on_error("the run could not be closed"):
                self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome))
        except SessionLostError as lost:
            _log.info("%s", lost)
        self._closing.close()

    def list_online(self) -> set[int]:
        """Return the ids of the nodes that are online."""
        with _lost_on_error("nodes cannot be listed"):
            return {node.node_id for node in self._client.GetNodes(GetNodesRequest()).nodes}

    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None:
        """Send every node of `envelopes` a train message with `parameters` and its own envelope.

        A message that was not fetched after `lifetime_s` is dropped, and so is its reply.
        """
        arrays = ArrayRecord({"parameters": Array(parameters)})
        nodes = list(envelopes)
        for start in range(0, len(nodes), MESSAGES_PER_REQUEST):
            batch = nodes[start : start + MESSAGES_PER_REQUEST]
            messages = [_build_message(arrays, envelopes[node], node, lifetime_s) for node in batch]
            with _lost_on_error("messages cannot be sent"), no_object_id_recompute():
                for message_id, node in zip(self._push(messages), batch, strict=True):
                    if message_id:
                        self._asked[message_id] = node
                    else:
                        _log.warning("the SuperLink takes no message for node %d", node)

    def collect(self) -> Iterator[Reply]:
        """Yield the replies that have come since the last call, one in memory at a time."""
        arriving, self._arriving = self._arriving, []
        for node_id, tree in arriving:
            yield from self._receive(node_id, tree)
        asked = list(self._asked)
        for start in range(0, len(asked), MESSAGES_PER_REQUEST):
            request = PullAppMessagesRequest(message_ids=asked[start : start + MESSAGES_PER_REQUEST])
            with _lost_on_error("replies cannot be fetched"):
                pulled = self._client.PullMessages(request)
            for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                node = self._asked.pop(message_from_proto(head).metadata.reply_to_message_id, None)
                if node is not None:
                    yield from self._receive(node, tree)

    def forget(self) -> None:
        """Ignore whatever has not been answered yet: the round is over."""
        self._asked.clear()
        self._arriving.clear()

    def _open(self) -> None:
        token = self._claim()
        self._client = self._closing.enter_context(
            self._connect_runtime(RuntimeTokenHttpInterceptor(token=token), name="flwr-serverapp")
        )
        task = self._client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self._run_id, self._here = task.run.run_id, Node(node_id=SUPERLINK_NODE_ID)
        heartbeat = HeartbeatSender(self._beat)
        heartbeat.start()
        self._closing.callback(heartbeat.stop)

    def _claim(self) -> str:
        """Return the token of the ServerApp task of a new run."""
        secret = self._secret_path.read_bytes().strip()
        acquiring = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
        fab = build_fab_from_files(_FAB_FILES)[0]
        request = StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})), federation="")
        with (
            self._secret_path.open("rb") as lock,
            _connect_control(self._address, self._ca_path) as control,
            self._connect_runtime(acquiring, name="SuperExec") as executor,
        ):
            # AcquireTask gives the oldest task of any run: drivers must not claim each other's.
            fcntl.flock(lock, fcntl.LOCK_EX)
            run_id = control.StartRun(request).run_id
            deadline = time.monotonic() + CLAIM_MAX_S
            while time.monotonic() < deadline:
                answer = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                if answer.HasField("task") and answer.task.run_id == run_id:
                    return str(answer.token)
                time.sleep(0.05)
        raise SessionLostError(f"the SuperLink did not hand out the task of run {run_id} within {CLAIM_MAX_S:g} s")

    def _connect_runtime(self, interceptor: Any, *, name: str) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self._address,
            insecure=False,
            root_certificates=self._ca_path.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name=name), interceptor],
            retry_invoker=_build_retries(),
        )

    def _beat(self) -> bool:
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    def _push(self, messages: list[Message]) -> list[str]:
        objects: dict[str, InflatableObject] = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            objects.update(get_all_nested_objects(message))
        pushed = self._client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message)) for message in messages],
                message_object_trees=[get_object_tree(message) for message in messages],
            )
        )
        push_objects(
            objects,
            make_push_object_fn_protobuf(self._client.PushObject, self._here, self._run_id, pushed.session_id),
            object_ids_to_push=set(pushed.objects_to_push),
        )
        return list(pushed.message_ids)

    def _receive(self, node_id: int, tree: ObjectTree) -> Iterator[Reply]:
        """Yield the reply of a node, unless its arrays are still on their way."""
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._here, self._run_id)
        try:
            contents = self._pull(pull, tree)
            reply = _build_reply(node_id, inflate_object_from_contents(tree.object_id, contents))
        except ObjectUnavailableError:
            self._arriving.append((node_id, tree))
        except SessionLostError:
            raise
        except ObjectPullError:
            yield Reply(node_id=node_id)
        except Exception as error:  # noqa: BLE001 - a device may send anything, and it concerns nobody else
            yield Reply(node_id=node_id, failure=f"the reply cannot be read ({type(error).__name__})")
        else:
            yield reply

    def _pull(self, pull: Callable[[str], bytes], tree: ObjectTree) -> dict[str, bytes]:
        with _lost_on_error("a reply cannot be fetched"):
            # The whole tree before confirming: that deletes what the device may not have finished sending.
            contents = {branch.object_id: pull(branch.object_id) for branch in iterate_object_tree(tree)}
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self._here, run_id=self._run_id, message_object_id=tree.object_id)
            )
        return contents


def _build_message(arrays: ArrayRecord, envelope: bytes, node_id: int, lifetime_s: float) -> Message:
    content = RecordDict({"arrays": arrays, "order": ConfigRecord({"envelope": envelope})})
    return Message(content, node_id, "train", ttl=lifetime_s)


def _build_reply(node_id: int, message: object) -> Reply:
    if not isinstance(message, Message):
        return Reply(node_id=node_id, failure="the reply is no message")
    if not message.has_content():
        return Reply(node_id=node_id)
    if set(message.content) != {"arrays"}:
        return Reply(node_id=node_id, failure=f"the reply holds {sorted(message.content)!r:.200}, not ['arrays']")
    record = message.content["arrays"]
    return Reply(node_id=node_id, arrays={name: record[name].numpy() for name in record})
