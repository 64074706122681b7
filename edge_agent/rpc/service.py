"""What is answered to which method: the same as over HTTP, in the words of gRPC."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc

from edge_agent.errors import AgentError, RequestError
from edge_agent.http import describe, oip
from edge_agent.http.app import App
from edge_agent.http.batching import Outputs
from edge_agent.http.guard import check_origin
from edge_agent.http.listener import Limits
from edge_agent.rpc.messages import build_infer_message, load_messages, parse_infer_message, parse_message
from models.contract.manifest import ModelManifest

log = logging.getLogger(__name__)

SERVICE: Final = "inference.GRPCInferenceService"
_DETAILS_MAX = 1000  # characters; more would not pass as a header
_TURN_S: Final = 0.2  # for a message while others wait to arrive; over the loopback 4 MiB take some 10 ms
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_Headers: TypeAlias = dict[bytes, bytes]
_Method: TypeAlias = Callable[[Any, _Headers], Any]  # message to response, or to what it is awaited from


class GrpcCall:
    """An inference request over gRPC."""

    __slots__ = ("_answered", "_headers", "_kind", "_message")
    is_alone = False  # a connection has many

    def __init__(self, message: Any, headers: _Headers, kind: Any, answered: asyncio.Future[Any]) -> None:
        self._message = message
        self._headers = headers
        self._kind = kind
        self._answered = answered

    def parse(self) -> oip.InferRequest:
        asked = parse_infer_message(self._message)
        if (key := self._headers.get(b"edge-key")) is not None:
            asked.key = key.decode("latin-1")
        return asked

    def answer(self, manifest: ModelManifest, asked: oip.InferRequest, outputs: Outputs, feedback_id: str) -> None:
        response = build_infer_message(self._kind, manifest, asked, outputs, feedback_id)
        if not self._answered.done():  # its client may have gone
            self._answered.set_result(response)

    def refuse(self, error: Exception) -> None:
        if not self._answered.done():
            self._answered.set_exception(error)


class GrpcService:
    """Answers for `app` over gRPC; on its event loop only."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._buffered_bytes = 0
        # For messages to arrive, whatever their length will be; with one alone, whoever is silent would hold up all.
        self._places = asyncio.Semaphore(max(2, limits.bodies_bytes // limits.body_bytes))
        self._messages = load_messages()
        models = app.device.models
        methods: dict[str, _Method] = {
            "ServerLive": lambda _message, _headers: {"live": True},
            "ServerReady": lambda _message, _headers: {"ready": models.is_ready()},
            "ModelReady": lambda message, _headers: {"ready": models.is_ready(message.name, message.version or None)},
            "ServerMetadata": lambda _message, _headers: describe.describe_server(app.device.agent_version),
            "ModelMetadata": self._describe_model,
            "ModelInfer": self._infer,
            "ModelConfig": self._describe_config,
            "ModelStatistics": self._describe_statistics,
            "RepositoryIndex": self._describe_repository,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        self.handlers: Final = {name: self._build_handler(name, method) for name, method in methods.items()}

    def _build_handler(self, name: str, method: _Method) -> grpc.RpcMethodHandler:
        asked, answered = self._messages[f"{name}Request"], self._messages[f"{name}Response"]

        async def handle(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            try:
                found = await self._answer(asked, method, context)
                response = answered(**found) if isinstance(found, dict) else found
                return bytes(response.SerializeToString())
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
                code, details = _describe_error(error)
            await context.abort(code, details)
            raise AssertionError  # `abort` has raised

        # As a stream of one message, so that a client that never sends it can be told so, and bytes,
        # since gRPC calls a message that it cannot parse an error of the server.
        return grpc.stream_unary_rpc_method_handler(handle)

    async def _answer(self, kind: Any, method: _Method, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        headers = _build_headers(context)
        check_origin(headers)
        if self._app.is_draining:
            raise RequestError("the agent ends and takes no more requests", status=503)
        data = await self._read(context)
        self._buffered_bytes += len(data)
        try:
            if self._buffered_bytes > self._limits.bodies_bytes:
                raise RequestError("too much is under way already: try again later", status=503)
            found = method(parse_message(kind, data), headers)
            return await found if isinstance(found, Awaitable) else found
        finally:
            self._buffered_bytes -= len(data)

    async def _read(self, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            async with asyncio.timeout(self._limits.request_s), self._places:
                data = await self._receive(context)
        except TimeoutError as error:
            raise RequestError(f"expected a whole message within {self._limits.request_s:g} s") from error
        if not isinstance(data, bytes):
            raise RequestError("expected one message, got none")
        return data

    async def _receive(self, context: grpc.aio.ServicerContext[Any, Any]) -> object:
        """Return the message; gRPC has memory for the whole of it from now on, however slowly it comes."""
        receiving = asyncio.ensure_future(context.read())
        try:
            while not (await asyncio.wait((receiving,), timeout=_TURN_S))[0]:
                if self._places.locked():
                    raise RequestError("the message came too slowly while others waited: try again later", status=503)
            return receiving.result()
        finally:
            receiving.cancel()

    async def _infer(self, message: Any, headers: _Headers) -> Any:
        answered = asyncio.get_running_loop().create_future()
        call = GrpcCall(message, headers, self._messages["ModelInferResponse"], answered)
        self._app.inference.begin(call, message.model_name, message.model_version or None)
        return await answered

    def _describe_model(self, message: Any, _headers: _Headers) -> dict[str, Any]:
        models = self._app.device.models
        manifest = models.select(message.name, message.version or None).manifest
        document = describe.describe_model(manifest, [model.version for model in models.list_models()])
        document.pop("parameters", None)  # there is no field for them here
        return document

    def _describe_config(self, message: Any, _headers: _Headers) -> dict[str, Any]:
        manifest = self._app.device.models.select(message.name, message.version or None).manifest
        return {"config": describe.describe_config(manifest, max_rows=oip.ROWS_MAX)}

    def _describe_statistics(self, message: Any, _headers: _Headers) -> dict[str, Any]:
        models = self._app.device.models
        if message.name or message.version:
            chosen = models.select(message.name, message.version or None)
            return describe.describe_statistics([chosen] if message.version else models.list_models())
        return describe.describe_statistics(models.list_models())

    def _describe_repository(self, message: Any, _headers: _Headers) -> dict[str, Any]:
        models = self._app.device.models
        lines = describe.describe_repository(models.name, models.list_models())
        return {"models": [line for line in lines if line["state"] == "READY" or not message.ready]}

    async def _load(self, message: Any, headers: _Headers) -> dict[str, Any]:
        return await self._change(self._app.device.models.load, message, headers)

    async def _unload(self, message: Any, headers: _Headers) -> dict[str, Any]:
        return await self._change(self._app.device.models.unload, message, headers)

    async def _change(self, change: Callable[[str], None], message: Any, headers: _Headers) -> dict[str, Any]:
        self._app.guard.check_owner(headers)
        await asyncio.to_thread(change, message.model_name)
        return {}


def _build_headers(context: grpc.aio.ServicerContext[Any, Any]) -> _Headers:
    return {
        key.encode(): value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        for key, value in context.invocation_metadata() or ()
    }


def _describe_error(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, AgentError):
        status = error.status if isinstance(error, RequestError) else 503
        text = str(error).encode("utf-8", "replace").decode()
        return _CODES.get(status, grpc.StatusCode.UNAVAILABLE), text[:_DETAILS_MAX]
    log.error("a request could not be answered", exc_info=error)
    return grpc.StatusCode.INTERNAL, "the agent failed on this request; its log says why"
