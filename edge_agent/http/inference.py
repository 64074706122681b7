"""An inference request from its bytes to its answer's, whichever door it came through.

Small models run on the event loop: a hop to a thread would cost more than the run.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol, TypeAlias

from edge_agent.errors import AgentError
from edge_agent.http import oip
from edge_agent.http.answers import BINARY, Answer, answer_failure
from edge_agent.http.batching import Job, Outputs, TickBatcher
from edge_agent.http.binary import HEADER_NAME
from edge_agent.http.connection import Request
from edge_agent.http.datatypes import Array
from edge_agent.http.ports import Model, Models
from models.contract.manifest import ModelManifest

WAITING_MAX = 256  # requests; the next one is answered 429
_LENGTH_HEADER = HEADER_NAME.lower().encode()

Remember: TypeAlias = Callable[[str, Mapping[str, Array]], None]


class Call(Protocol):
    """One inference request, as the door that it came through has it; answered or refused once.

    Attributes:
        is_alone: Whether no other can come in this turn of the loop.
    """

    @property
    def is_alone(self) -> bool: ...

    def parse(self) -> oip.InferRequest:
        """Return what is asked; raises RequestError."""
        ...

    def answer(self, manifest: ModelManifest, asked: oip.InferRequest, outputs: Outputs, feedback_id: str) -> None:
        """Send the outputs; raises RequestError if they cannot be had as they were asked for."""
        ...

    def refuse(self, error: Exception) -> None:
        """Send why there is no answer."""
        ...


class HttpCall:
    """A request over HTTP."""

    __slots__ = ("_request", "is_alone")

    def __init__(self, request: Request) -> None:
        self._request = request
        self.is_alone: Final = request.is_alone

    def parse(self) -> oip.InferRequest:
        headers = self._request.head.headers
        asked = oip.parse_infer_request(self._request.body, headers.get(_LENGTH_HEADER))
        if (key := headers.get(b"edge-key")) is not None:
            asked.key = key.decode("latin-1")
        return asked

    def answer(self, manifest: ModelManifest, asked: oip.InferRequest, outputs: Outputs, feedback_id: str) -> None:
        response = oip.build_infer_response(manifest, asked, outputs, feedback_id)
        if response.json_bytes is None:
            self._request.reply(Answer(response.body))
        else:
            header = b"%b: %d\r\n" % (_LENGTH_HEADER, response.json_bytes)
            self._request.reply(Answer(response.body, 200, BINARY, header))

    def refuse(self, error: Exception) -> None:
        self._request.reply(answer_failure(error))


class Inference:
    """Everything between a request and the models."""

    def __init__(
        self,
        models: Models,
        *,
        record_latency: Callable[[float], None],
        record_failure: Callable[[], None],
        remember: Remember | None = None,
    ) -> None:
        """Prepare to answer.

        Args:
            models: What answers.
            record_latency: Told how long each answer took, s.
            record_failure: Told of each request that was refused.
            remember: Told of each answered request, if anything is kept.
        """
        self._models = models
        self._record_latency = record_latency
        self._record_failure = record_failure
        self._remember = remember
        self._batcher = TickBatcher(WAITING_MAX)

    def begin(self, call: Call, name: str, version: str | None) -> None:
        """Answer `call` when the models come to it.

        Args:
            call: For the model `name`.
            name: As the caller says it.
            version: None for whichever the split decides.

        Raises:
            AgentError: It is not answered.
        """
        started_s = time.perf_counter()
        model: Model | None = None
        try:
            try:
                asked = call.parse()
            except AgentError:
                model = self._models.select(name, version)  # that it is not here is the better reason
                raise
            # Held for the whole request: it may be swapped meanwhile.
            model = self._models.select(name, version, key=asked.key)
            model.check(asked.inputs)
            rows = len(next(iter(asked.inputs.values())))
            finish = partial(self._finish, call, asked)
            self._batcher.add(Job(model, asked.inputs, rows, started_s, finish), is_alone=call.is_alone)
        except AgentError:
            self._count_failure(model, started_s)
            raise

    def _finish(self, call: Call, asked: oip.InferRequest, job: Job, found: Outputs | AgentError) -> None:
        """Answer with the outputs found, or with the reason that there are none."""
        remember = self._remember
        try:
            if isinstance(found, AgentError):
                raise found
            feedback_id = uuid.uuid4().hex if remember else ""
            call.answer(job.model.manifest, asked, found, feedback_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
            self._count_failure(job.model, job.started_s)
            call.refuse(error)
            return
        duration_s = time.perf_counter() - job.started_s
        self._record_latency(duration_s)
        job.model.statistics.record(job.rows, duration_s)
        self._models.mirror(job.model, job.inputs, found)
        if remember:
            remember(feedback_id, job.inputs)

    def _count_failure(self, model: Model | None, started_s: float) -> None:
        self._record_failure()
        if model is not None:
            model.statistics.record_failure(time.perf_counter() - started_s)
