"""The local HTTP API of a device, as a raw ASGI application.

Inference runs on the event loop: for the small models of a device a hop to a thread would cost more than
the run. Whatever touches samples or privacy answers on the Unix socket only, so that neither a web page
nor another user of the machine can read or label somebody's data.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec

from edge_agent.errors import AgentError, RequestError
from edge_agent.http import oip
from edge_agent.http.oip import Array
from edge_agent.http.samples import parse_feedback, parse_rows, parse_samples
from models.contract.manifest import ModelManifest

Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]

BODY_MAX_BYTES = 4 * 1024 * 1024  # 1300 images of 28 x 28 as JSON
BODY_TIMEOUT_S = 10.0  # for a whole body; over a loopback or Unix socket 4 MiB take milliseconds
_JSON = b"application/json"
_KEY_HEADER = b"edge-key"  # a caller that sends the same stays with the same version
_TEXT = b"text/plain; version=0.0.4; charset=utf-8"


class Statistics(Protocol):
    """Counts the answers of one version."""

    def record(self, rows: int, duration_s: float) -> None: ...


class Model(Protocol):
    """A model version that answers."""

    @property
    def manifest(self) -> ModelManifest: ...

    @property
    def statistics(self) -> Statistics: ...

    def infer(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...


class Models(Protocol):
    """The loaded versions; each method raises RequestError for what is not served."""

    @property
    def name(self) -> str: ...

    def list_models(self) -> Sequence[Model]: ...

    def select(self, name: str, version: str | None, *, key: str = "") -> Model: ...

    def mirror(self, model: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None: ...

    def load(self, name: str) -> None: ...

    def unload(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the API asks of the agent.

    Attributes:
        models: The loaded versions.
        add_samples: Keeps samples durably and returns their ids; may block.
        build_inputs: Returns raw rows as the model's inputs; may block.
        get_status: A document for the device's owner.
        get_privacy: What training has cost so far, a document for the device's owner; may block.
        get_metrics: Prometheus text.
        record_latency: Told how long each answer took, s.
        record_failure: Told of each inference request that was refused.
        remember: Told of each answered request, with an id that nobody can guess; None without consent.
        add_feedback: Keeps the truth about such a request durably and returns the samples' ids; may block.
    """

    agent_version: str
    models: Models
    add_samples: Callable[[Sequence[tuple[Any, Any]]], list[int]]
    build_inputs: Callable[[Sequence[Any]], Mapping[str, Array]]
    get_status: Callable[[], object]
    get_privacy: Callable[[], object]
    get_metrics: Callable[[], str]
    record_latency: Callable[[float], None]
    record_failure: Callable[[], None]
    remember: Callable[[str, Mapping[str, Array]], None] | None = None
    add_feedback: Callable[[str, object], list[int]] | None = None


class App:
    """ASGI 3 application; one instance answers on TCP and on the Unix socket."""

    def __init__(self, device: Device, *, uds_path: Path | None, host: str) -> None:
        """Prepare the application.

        Args:
            device: What it shows to the outside.
            uds_path: The Unix socket, if there is one; what arrives elsewhere is not trusted.
            host: The configured address, accepted in `Host` beside the loopback's names.
        """
        self._device = device
        self._uds = None if uds_path is None else (str(uds_path), None)
        self._hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"})
        self._routes: dict[str, tuple[str, _Handler]] = {
            "v2": ("GET", self._get_server),
            "v2/health/live": ("GET", self._get_live),
            "v2/health/ready": ("GET", self._get_ready),
            "v2/repository/index": ("POST", self._post_index),
            "v1/samples": ("POST", self._post_samples),
            "v1/feedback": ("POST", self._post_feedback),
            "v1/rows": ("POST", self._post_rows),
            "v1/status": ("GET", self._get_status),
            "v1/privacy": ("GET", self._get_privacy),
            "metrics": ("GET", self._get_metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except AgentError as error:
            status = error.status if isinstance(error, RequestError) else 503
            answer = _Answer(_build_json({"error": str(error)}), status=status, headers=_build_headers(error))
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", b"%d" % len(answer.body)),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Scope, receive: Receive) -> "_Answer":
        is_local = scope["server"] == self._uds
        if not is_local:
            self._check_sender(scope["headers"])
        parts = scope["path"].split("/")[1:]
        if not is_local and (parts[0] == "v1" or parts[:3] == ["v2", "repository", "models"]):
            raise RequestError("this answers on the Unix socket only", status=403)
        method, handler = self._route(parts)
        if scope["method"] != method:
            raise _MethodError(scope["path"], scope["method"], method)
        return await handler(_Body(scope["headers"], receive))

    def _check_sender(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuse what a web page sends: it carries an Origin, or, after DNS rebinding, a foreign Host."""
        host = ""
        for name, value in headers:
            if name == b"origin":
                raise RequestError("requests of web pages (header Origin) are refused", status=403)
            if name == b"host":
                host = value.decode("latin-1")
        if _strip_port(host) not in self._hosts:
            raise RequestError(f"header Host: expected one of {', '.join(sorted(self._hosts))}", status=403)

    def _route(self, parts: list[str]) -> tuple[str, "_Handler"]:
        match parts:
            case ["v2", "models", name, "versions", version, *rest]:
                return self._route_model(name, version, rest)
            case ["v2", "models", name, *rest]:
                return self._route_model(name, None, rest)
            case ["v2", "repository", "models", name, "load"]:
                return "POST", partial(self._change_repository, self._device.models.load, name)
            case ["v2", "repository", "models", name, "unload"]:
                return "POST", partial(self._change_repository, self._device.models.unload, name)
        if route := self._routes.get("/".join(parts)):
            return route
        raise _build_not_found(parts)

    def _route_model(self, name: str, version: str | None, rest: list[str]) -> tuple[str, "_Handler"]:
        match rest:
            case ["infer"]:
                return "POST", partial(self._infer, name, version)
            case ["ready"]:
                return "GET", partial(self._get_model_ready, name, version)
            case []:
                return "GET", partial(self._get_model_metadata, name, version)
        raise _build_not_found(["v2", "models", name, *rest])

    async def _infer(self, name: str, version: str | None, body: "_Body") -> "_Answer":
        try:
            data = await body.read()
            started_s = time.perf_counter()
            self._device.models.select(name, version)  # what is not served is not parsed
            request = oip.parse_infer_request(data)
            # One reference for the whole request: versions may change meanwhile.
            model = self._device.models.select(name, version, key=body.get_header(_KEY_HEADER) or request.id)
            outputs = model.infer(request.inputs)
            feedback_id = uuid.uuid4().hex if self._device.remember else ""
            answer = oip.build_infer_response(model.manifest, request, outputs, feedback_id)
        except RequestError:
            self._device.record_failure()
            raise
        duration_s = time.perf_counter() - started_s
        self._device.record_latency(duration_s)
        model.statistics.record(len(next(iter(request.inputs.values()))), duration_s)
        self._device.models.mirror(model, request.inputs, outputs)
        if self._device.remember:
            self._device.remember(feedback_id, request.inputs)
        return _Answer(answer)

    async def _get_server(self, _body: "_Body") -> "_Answer":
        return _Answer(oip.build_server_metadata(self._device.agent_version))

    async def _get_live(self, _body: "_Body") -> "_Answer":
        return _Answer(_build_json({"live": True}))

    async def _get_ready(self, _body: "_Body") -> "_Answer":
        is_ready = bool(self._device.models.list_models())
        return _Answer(_build_json({"ready": is_ready}), status=200 if is_ready else 503)

    async def _get_model_ready(self, name: str, version: str | None, _body: "_Body") -> "_Answer":
        model = self._device.models.select(name, version)
        return _Answer(_build_json({"name": model.manifest.model, "ready": True}))

    async def _get_model_metadata(self, name: str, version: str | None, _body: "_Body") -> "_Answer":
        model = self._device.models.select(name, version)
        served = [model] if version else self._device.models.list_models()
        return _Answer(oip.build_model_metadata(model.manifest, [each.manifest.version for each in served]))

    async def _post_index(self, _body: "_Body") -> "_Answer":
        models = self._device.models
        rows = [{"name": models.name, "version": str(each.manifest.version), "state": "READY"}
                for each in models.list_models()]  # fmt: skip
        return _Answer(_build_json(rows or [{"name": models.name, "state": "UNAVAILABLE"}]))

    async def _change_repository(self, change: Callable[[str], None], name: str, _body: "_Body") -> "_Answer":
        await asyncio.to_thread(change, name)
        return _Answer(_build_json({}))

    async def _post_samples(self, body: "_Body") -> "_Answer":
        samples = parse_samples(await body.read())
        ids = await asyncio.to_thread(self._device.add_samples, samples)  # waits for the disk
        return _Answer(_build_json({"ids": ids}))

    async def _post_feedback(self, body: "_Body") -> "_Answer":
        if self._device.add_feedback is None:
            raise RequestError("feedback is not kept here", status=404)
        request_id, target = parse_feedback(await body.read())
        ids = await asyncio.to_thread(self._device.add_feedback, request_id, target)  # waits for the disk
        return _Answer(_build_json({"ids": ids}))

    async def _post_rows(self, body: "_Body") -> "_Answer":
        rows = parse_rows(await body.read())
        return _Answer(oip.build_tensors(await asyncio.to_thread(self._device.build_inputs, rows)))

    async def _get_status(self, _body: "_Body") -> "_Answer":
        return _Answer(_build_json(self._device.get_status()))

    async def _get_privacy(self, _body: "_Body") -> "_Answer":
        return _Answer(_build_json(await asyncio.to_thread(self._device.get_privacy)))

    async def _get_metrics(self, _body: "_Body") -> "_Answer":
        return _Answer(self._device.get_metrics().encode(), content_type=_TEXT)


@dataclass(frozen=True, slots=True)
class _Answer:
    body: bytes
    status: int = 200
    content_type: bytes = _JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


class _Body:
    """The body of one request, not read before it is wanted."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> None:
        self._headers = headers
        self._receive = receive

    def get_header(self, name: bytes) -> str:
        """Return the header's value, empty without it; `name` in lower case."""
        return next((value.decode("latin-1") for key, value in self._headers if key == name), "")

    async def read(self) -> bytes:
        """Return the body.

        Raises:
            RequestError: Too long, too slow, compressed, or cut off.
        """
        for name, value in self._headers:
            if name == b"content-encoding" and value != b"identity":
                raise RequestError("expected a body without content-encoding", status=415)
            if name == b"content-length" and int(value) > BODY_MAX_BYTES:
                raise _build_too_long()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read_all()
        except TimeoutError as error:
            raise RequestError(f"the body was not complete after {BODY_TIMEOUT_S:.0f} s", status=408) from error

    async def _read_all(self) -> bytes:
        chunks, size_bytes = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise RequestError("the connection ended within the body")
            chunks.append(message.get("body", b""))
            size_bytes += len(chunks[-1])
            if size_bytes > BODY_MAX_BYTES:
                raise _build_too_long()
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)


_Handler: TypeAlias = Callable[[_Body], Awaitable[_Answer]]


class _MethodError(RequestError):
    def __init__(self, path: str, found: str, expected: str) -> None:
        super().__init__(f"{path}: expected {expected}, got {found}", status=405)
        self.expected = expected


def _build_headers(error: AgentError) -> tuple[tuple[bytes, bytes], ...]:
    if isinstance(error, _MethodError):
        return ((b"allow", error.expected.encode()),)
    if isinstance(error, RequestError) and error.status == 408:
        return ((b"connection", b"close"),)  # the rest of the body must not be taken for the next request
    return ()


def _build_not_found(parts: Iterable[str]) -> RequestError:
    return RequestError(f"there is nothing at {'/' + '/'.join(parts)!r:.200}", status=404)


def _build_too_long() -> RequestError:
    return RequestError(f"expected a body of at most {BODY_MAX_BYTES} bytes", status=413)


def _build_json(document: object) -> bytes:
    return msgspec.json.encode(document)


def _strip_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return name.lower() if separator and port.isdecimal() else host.lower()
