"""This device as a Flower node: answers train messages until none has come for a while.

The only door to flwr on the device. No app bundle of the server is ever fetched or run: what trains
is `handle`, and what it does not answer stays unanswered.

    joining --activated--> polling --message--> answering
       ^                    |  ^                    |
       `---- forgotten -----'  `--------------------'      nothing for `idle_timeout_s`: the end
"""

import logging
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # flwr reads both while it is imported
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from edge_agent.errors import StalledError, TransientError
from models.contract.files import save_atomically
from models.contract.identity import Identity
from models.tensors.layout import Vector, parse_vector_bytes

Handle: TypeAlias = Callable[[Vector, bytes], bytes | None]

_log = logging.getLogger(__name__)

HEARTBEAT_S = 30.0  # SuperLink takes a node for gone after two of them
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
RECORD_RETRY_FIRST_S, RECORD_RETRY_MAX_S = 0.02, 1.0  # a message is announced before its records are there
RECORD_MAX_S = 60.0


def serve(
    *,
    superlink: str,
    ca_path: Path,
    node_key_path: Path,
    identity: Identity | None = None,
    poll_interval_s: float,
    idle_timeout_s: float,
    handle: Handle,
    on_joined: Callable[[], None],
) -> None:
    """Answer train messages of the SuperLink at `superlink` until none has come for `idle_timeout_s`.

    A SuperLink that is away, restarts or has forgotten this device is tried again until then.

    Args:
        superlink: HOST:PORT of it, or of the proxy before it.
        ca_path: Certificate authority of whichever that is, PEM.
        node_key_path: The device's NIST-curve private key, PEM or OpenSSH. Beside it, with the suffix
            ".node", the node id is kept: a process that was killed rejoins at once by it.
        identity: Whose certificate the proxy is shown; None to show none.
        poll_interval_s: How often to ask for a message; > 0.
        idle_timeout_s: > 0.
        handle: Gets parameters, shape (n,), float32, and the envelope; returns the encoded update, or None to
            answer nothing. What it raises is logged without its message, which may tell of private data.
        on_joined: Called once, when the SuperLink has let this device in.

    Raises:
        TransientError: The SuperLink never let this device in.
        StalledError: A key or certificate cannot be read.
    """
    try:
        key = _load_key(node_key_path)
        context = ssl.create_default_context(cafile=ca_path)
        if identity is not None:
            context.load_cert_chain(identity.cert_path, identity.key_path)
    except (OSError, ValueError) as error:
        files = [node_key_path, ca_path, *([identity.cert_path, identity.key_path] if identity else [])]
        raise StalledError(f"cannot join the SuperLink with {', '.join(map(str, files))}: {error}") from error
    _Node(f"https://{superlink}", context, key, node_key_path.with_suffix(".node"), idle_timeout_s).serve(
        poll_interval_s, handle, on_joined
    )


def _load_key(path: Path) -> EllipticCurvePrivateKey:
    data = path.read_bytes()
    key = (load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key)(data, None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("the node key is not an elliptic curve key")
    return key


class _Node:
    """The membership of this device, and the messages it gets."""

    def __init__(
        self, url: str, context: ssl.SSLContext, key: EllipticCurvePrivateKey, id_path: Path, idle_timeout_s: float
    ) -> None:
        interceptors = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ]
        retries = RetryInvoker(
            lambda: exponential(base_delay=RETRY_FIRST_S, max_delay=RETRY_MAX_S),
            (httpx.TransportError, httpx.HTTPStatusError),
            max_tries=None,
            max_time=None,
            should_giveup=lambda error: self._is_idle() or _status(error) in range(400, 500),
        )
        # Heartbeats and the farewell are not repeated: nobody waits for them.
        self._once = FleetHttpClient(url, interceptors=interceptors, verify=context)
        self._client = FleetHttpClient(url, interceptors=interceptors, verify=context, retry_invoker=retries)
        self._public_key = public_key_to_bytes(key.public_key())
        self._id_path, self._idle_timeout_s = id_path, idle_timeout_s
        self._node: Node | None = None
        self._heard_at = time.monotonic()

    def serve(self, poll_interval_s: float, handle: Handle, on_joined: Callable[[], None]) -> None:
        heartbeat, has_joined = HeartbeatSender(self._beat), False
        try:
            while not self._is_idle():
                if self._node is None:
                    if not self._join():
                        time.sleep(min(poll_interval_s, RETRY_MAX_S))
                        continue
                    if not has_joined:
                        has_joined = True
                        heartbeat.start()
                        on_joined()
                self._answer_next(handle)
                time.sleep(poll_interval_s)  # after an answer too: the next round is not there at once
        finally:
            if heartbeat.is_running:
                heartbeat.stop()
            self._leave()
            self._client.close()
            self._once.close()
        if not has_joined:
            raise TransientError(f"the SuperLink did not let this device in within {self._idle_timeout_s:g} s")

    def _is_idle(self) -> bool:
        return time.monotonic() - self._heard_at >= self._idle_timeout_s

    def _join(self) -> bool:
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_S)
        try:
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        except httpx.HTTPError as error:
            _log.warning("the SuperLink does not let this device in: %s", _describe(error))
            # SuperLink refuses a node that it believes online, as it does after this process was killed.
            self._forget_past()
            return False
        save_atomically(self._id_path, str(self._node.node_id).encode())
        return True

    def _forget_past(self) -> None:
        try:
            self._once.DeactivateNode(DeactivateNodeRequest(node_id=int(self._id_path.read_text())))
        except (OSError, ValueError, httpx.HTTPError):
            _log.debug("no earlier membership to end")

    def _leave(self) -> None:
        if self._node is not None:
            try:
                self._once.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except httpx.HTTPError as error:
                _log.info("left without a farewell: %s", _describe(error))

    def _beat(self) -> bool:
        node = self._node
        if node is None:
            return True
        try:
            request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_S)
            return bool(self._once.SendNodeHeartbeat(request).success)
        except httpx.HTTPError:
            return False

    def _answer_next(self, handle: Handle) -> None:
        """Answer one message, if there is one; whatever goes wrong with it is logged."""
        try:
            pulled = self._client.PullMessages(PullMessagesRequest(node=self._node))
        except httpx.HTTPError as error:
            _log.warning("no messages: %s", _describe(error))
            if _status(error) == httpx.codes.UNAUTHORIZED:  # a SuperLink with a new database
                self._node = None
            return
        if not pulled.messages_list:
            return
        self._heard_at = time.monotonic()
        try:
            message = message_from_proto(pulled.messages_list[0])
            records = pulled.message_object_trees[0].children
            contents = [self._pull(message.metadata.run_id, record.object_id) for record in records]
            update = _apply(handle, message, contents)
            self._heard_at = time.monotonic()
            if update is not None:
                self._reply(message, update)
        except (httpx.HTTPError, _LostRecordError) as error:
            _log.warning("the message stays unanswered: %s", _describe(error))
        self._heard_at = time.monotonic()

    def _pull(self, run_id: int, object_id: str) -> bytes:
        deadline, pause_s = time.monotonic() + RECORD_MAX_S, RECORD_RETRY_FIRST_S
        while True:
            request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            pulled = self._client.PullObject(request)
            if pulled.object_available:
                return bytes(pulled.object_content)
            if not pulled.object_found or time.monotonic() > deadline:
                raise _LostRecordError("a record of it is not at the SuperLink")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, RECORD_RETRY_MAX_S)

    def _reply(self, message: Message, update: bytes) -> None:
        reply, content = Message(RecordDict(), reply_to=message), _build_record(update).deflate()
        record = ObjectTree(object_id=get_object_id(content))
        head = message_to_proto(reply)
        head.metadata.message_id = reply.object_id
        pushed = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[head],
                message_object_trees=[ObjectTree(object_id=reply.object_id, children=[record])],
                # No clientapp_runtime_list: how long training took says how many samples were drawn.
            )
        )
        if record.object_id not in pushed.objects_to_push:
            return  # an equal record is there already, or nobody waits for the reply any more
        request = PushObjectRequest(
            node=self._node,
            run_id=message.metadata.run_id,
            object_id=record.object_id,
            object_content=content,
            session_id=pushed.session_id,
        )
        if not self._client.PushObject(request).stored:
            raise _LostRecordError("the SuperLink does not take the update")


class _LostRecordError(Exception):
    """A record did not get through."""


def _build_record(update: bytes) -> Any:
    return ConfigRecord({"update": update})


def _apply(handle: Handle, message: Message, contents: list[bytes]) -> bytes | None:
    try:
        (content,) = contents
        order, record = message.content["order"], ConfigRecord.inflate(content)
        if set(message.content) != {"order"} or set(order) != {"envelope"} or set(record) != {"parameters"}:
            raise TypeError
        envelope, data = order["envelope"], record["parameters"]
        if not isinstance(envelope, bytes) or not isinstance(data, bytes):
            raise TypeError
        parameters = parse_vector_bytes(data)
    except Exception as error:  # noqa: BLE001 - a stranger's message may be wrong in any way
        _log.warning("a message that is no train message stays unanswered (%s)", type(error).__name__)
        return None
    try:
        return handle(parameters, envelope)
    except Exception as error:  # noqa: BLE001 - one round's failure must not cost the next
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
        _log.error("training failed with %s at %s; the message stays unanswered", type(error).__name__, where)
        return None


def _status(error: BaseException) -> int:
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0


def _describe(error: Exception) -> str:
    status = _status(error)
    if status == httpx.codes.BAD_REQUEST:  # the proxy's, for every certificate that it does not take
        return "HTTP 400: the device's certificate may be expired, revoked or of another authority"
    return f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
