"""The local API of a device: what is answered at which address.

What writes, and what tells of the device's owner, answers on the Unix socket, and over TCP only to the bearer of a
token: neither a web page nor another user of the machine can read or label somebody's data.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

import httptools

from edge_agent.errors import RequestError
from edge_agent.http import describe, oip
from edge_agent.http.answers import PROMETHEUS, Answer, MethodError, answer_failure, answer_json
from edge_agent.http.connection import Request
from edge_agent.http.datatypes import Array
from edge_agent.http.guard import Guard
from edge_agent.http.inference import HttpCall, Inference
from edge_agent.http.ports import Models
from edge_agent.http.samples import parse_feedback, parse_forget, parse_rows, parse_samples

_ROUTES_MAX = 256  # addresses that need not be taken apart again

_Handler: TypeAlias = Callable[[Request], Answer | Awaitable[Answer] | None]  # None: it is answered later


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the API asks of the agent.

    Attributes:
        models: What answers.
        add_samples: Keeps samples durably and returns their ids; may block.
        build_inputs: Returns raw rows as the model's inputs; may block.
        get_status: A document for the device's owner, when it is found.
        get_privacy: What training has cost so far, a document for the device's owner; may block.
        get_metrics: Prometheus text.
        record_latency: Told how long each answer took, s.
        record_failure: Told of each inference request that was refused.
        add_feedback: Keeps the truth about an answered request durably and returns the samples' ids; may block.
        forget: Deletes samples by their ids or by values of their columns, or all of them; may block.
        remember: Told of each answered request, under an id that nobody can guess; None if nothing is kept.
    """

    agent_version: str
    models: Models
    add_samples: Callable[[Sequence[tuple[Any, Any]]], list[int]]
    build_inputs: Callable[[Sequence[Any]], Mapping[str, Array]]
    get_status: Callable[[], Awaitable[object]]
    get_privacy: Callable[[], object]
    get_metrics: Callable[[], str]
    record_latency: Callable[[float], None]
    record_failure: Callable[[], None]
    add_feedback: Callable[[str, object], list[int]]
    forget: Callable[[Sequence[int | str], Mapping[str, Any]], object]
    remember: Callable[[str, Mapping[str, Array]], None] | None = None


@dataclass(frozen=True, slots=True)
class _Route:
    method: str
    handler: _Handler
    is_owners: bool = False


class App:
    """One instance answers on all sockets.

    Attributes:
        device: What it shows to the outside.
        guard: Who may ask what.
        inference: What answers inference requests.
        is_draining: Whether it is ready no more.
    """

    def __init__(self, device: Device, *, host: str, token: str | None = None) -> None:
        """Prepare the application.

        Args:
            device: What it shows to the outside.
            host: The configured address, accepted in `Host` beside the loopback's names.
            token: What lets a caller over TCP do what the Unix socket allows; None for nothing.
        """
        self.device = device
        self.guard = Guard(host, token)
        self.inference = Inference(
            device.models,
            record_latency=device.record_latency,
            record_failure=device.record_failure,
            remember=device.remember,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: dict[bytes, _Route] = {}
        self.is_draining = False
        self._routes: Final = {
            "v2": _Route("GET", self._get_server),
            "v2/health/live": _Route("GET", self._get_live),
            "v2/health/ready": _Route("GET", self._get_ready),
            "v2/models/stats": _Route("GET", self._get_all_statistics),
            "v2/repository/index": _Route("POST", self._post_index),
            "v1/feedback": _Route("POST", self._post_feedback, is_owners=True),
            "v1/samples": _Route("POST", self._post_samples, is_owners=True),
            "v1/forget": _Route("POST", self._post_forget, is_owners=True),
            "v1/rows": _Route("POST", self._post_rows, is_owners=True),
            "v1/status": _Route("GET", self._get_status, is_owners=True),
            "v1/privacy": _Route("GET", self._get_privacy, is_owners=True),
            "metrics": _Route("GET", self._get_metrics),
            "openapi.json": _Route("GET", self._get_description),
        }

    def handle(self, request: Request) -> None:
        """Answer `request`, now or later."""
        try:
            answer = self._find_handler(request)(request)
            if answer is None:
                return
            if isinstance(answer, Answer):
                request.reply(answer)
                return
            task = asyncio.ensure_future(_answer_later(request, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
            request.reply(answer_failure(error))

    def drain(self) -> None:
        """Be ready no more; what comes is still answered."""
        self.is_draining = True

    def _find_handler(self, request: Request) -> _Handler:
        if not request.is_local:
            self.guard.check_sender(request.head.headers)
        route = self._known.get(request.head.target)
        if route is None:
            path = _parse_path(request.head.target)
            route = self._route(path)
            if len(self._known) >= _ROUTES_MAX:
                self._known.clear()
            self._known[request.head.target] = route
        if route.is_owners and not request.is_local:
            self.guard.check_owner(request.head.headers)
        method = "GET" if request.head.method == b"HEAD" else request.head.method.decode("ascii")
        if method != route.method:
            raise MethodError(_parse_path(request.head.target), method, route.method)
        encoding = request.head.headers.get(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            raise RequestError("expected a body without content-encoding", status=415)
        return route.handler

    def _route(self, path: str) -> _Route:
        if route := self._routes.get(path[1:]):
            return route
        models = self.device.models
        match path.split("/")[1:]:
            case ["v2", "models", name, "versions", version, *rest]:
                return self._route_model(path, name, version, rest)
            case ["v2", "models", name, *rest]:
                return self._route_model(path, name, None, rest)
            case ["v2", "repository", "models", name, "load"]:
                return _Route("POST", partial(self._change_repository, models.load, name), is_owners=True)
            case ["v2", "repository", "models", name, "unload"]:
                return _Route("POST", partial(self._change_repository, models.unload, name), is_owners=True)
            case ["v1", *_]:
                return _Route("GET", partial(_refuse_path, path), is_owners=True)
        raise _build_not_found(path)

    def _route_model(self, path: str, name: str, version: str | None, rest: list[str]) -> _Route:
        match rest:
            case ["infer"]:
                return _Route("POST", partial(self._infer, name, version))
            case ["ready"]:
                return _Route("GET", partial(self._get_model_ready, name, version))
            case ["config"]:
                return _Route("GET", partial(self._get_model_config, name, version))
            case ["stats"]:
                return _Route("GET", partial(self._get_model_statistics, name, version))
            case []:
                return _Route("GET", partial(self._get_model_metadata, name, version))
        raise _build_not_found(path)

    def _infer(self, name: str, version: str | None, request: Request) -> None:
        self.inference.begin(HttpCall(request), name, version)

    def _get_server(self, _request: Request) -> Answer:
        return answer_json(describe.describe_server(self.device.agent_version))

    def _get_live(self, _request: Request) -> Answer:
        return answer_json({"live": True})

    def _get_ready(self, _request: Request) -> Answer:
        is_ready = self.device.models.is_ready() and not self.is_draining
        return answer_json({"ready": is_ready}, status=200 if is_ready else 503)

    def _get_model_ready(self, name: str, version: str | None, _request: Request) -> Answer:
        self.device.models.select(name, version)
        is_ready = not self.is_draining
        return answer_json({"name": name, "ready": is_ready}, status=200 if is_ready else 503)

    def _get_model_metadata(self, name: str, version: str | None, _request: Request) -> Answer:
        manifest = self.device.models.select(name, version).manifest
        versions = [model.version for model in self.device.models.list_models()]
        return answer_json(describe.describe_model(manifest, versions))

    def _get_model_config(self, name: str, version: str | None, _request: Request) -> Answer:
        manifest = self.device.models.select(name, version).manifest
        return answer_json(describe.describe_config(manifest, max_rows=oip.ROWS_MAX))

    def _get_model_statistics(self, name: str, version: str | None, _request: Request) -> Answer:
        chosen = self.device.models.select(name, version)
        models = self.device.models.list_models() if version is None else [chosen]
        return answer_json(describe.describe_statistics(models))

    def _get_all_statistics(self, _request: Request) -> Answer:
        return answer_json(describe.describe_statistics(self.device.models.list_models()))

    def _post_index(self, _request: Request) -> Answer:
        models = self.device.models
        return answer_json(describe.describe_repository(models.name, models.list_models()))

    async def _change_repository(self, change: Callable[[str], None], name: str, _request: Request) -> Answer:
        await asyncio.to_thread(change, name)
        return answer_json({})

    async def _post_samples(self, request: Request) -> Answer:
        samples = parse_samples(request.body)
        return answer_json({"ids": await asyncio.to_thread(self.device.add_samples, samples)})  # waits for the disk

    async def _post_feedback(self, request: Request) -> Answer:
        request_id, target = parse_feedback(request.body)
        return answer_json({"ids": await asyncio.to_thread(self.device.add_feedback, request_id, target)})

    async def _post_forget(self, request: Request) -> Answer:
        ids, where = parse_forget(request.body)
        return answer_json(await asyncio.to_thread(self.device.forget, ids, where))

    async def _post_rows(self, request: Request) -> Answer:
        rows = parse_rows(request.body)
        return Answer(oip.build_tensors(await asyncio.to_thread(self.device.build_inputs, rows)))

    async def _get_status(self, _request: Request) -> Answer:
        return answer_json(await self.device.get_status())

    async def _get_privacy(self, _request: Request) -> Answer:
        return answer_json(await asyncio.to_thread(self.device.get_privacy))

    def _get_metrics(self, _request: Request) -> Answer:
        return Answer(self.device.get_metrics().encode(), content_type=PROMETHEUS)

    def _get_description(self, _request: Request) -> Answer:
        return Answer(Path(__file__).with_name("openapi.json").read_bytes())


async def _answer_later(request: Request, answering: Awaitable[Answer]) -> None:
    try:
        request.reply(await answering)
    except Exception as error:  # noqa: BLE001
        request.reply(answer_failure(error))


def _parse_path(target: bytes) -> str:
    """Return the path of a request's target, unquoted."""
    try:
        path = target.partition(b"?")[0] if target.startswith(b"/") else httptools.parse_url(target).path
    except httptools.HttpParserError:
        path = None
    if path is None:
        raise RequestError(f"expected a path, got {target.decode('latin-1')!r:.200}")
    return unquote(path.decode("latin-1"))


def _refuse_path(path: str, _request: Request) -> Answer:
    raise _build_not_found(path)


def _build_not_found(path: str) -> RequestError:
    return RequestError(f"there is nothing at {path!r:.200}", status=404)
