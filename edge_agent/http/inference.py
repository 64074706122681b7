"""An inference request from its bytes to its answer's.

Small models run on the event loop: a hop to a thread would cost more than the run.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from edge_agent.errors import AgentError
from edge_agent.http import oip
from edge_agent.http.answers import BINARY, Answer, answer_failure
from edge_agent.http.batching import Job, Outputs, TickBatcher
from edge_agent.http.binary import HEADER_NAME
from edge_agent.http.connection import Request
from edge_agent.http.datatypes import Array
from edge_agent.http.ports import Model, Models

WAITING_MAX = 256  # requests; the next one is answered 429
_LENGTH_HEADER = HEADER_NAME.lower().encode()

Remember: TypeAlias = Callable[[str, Mapping[str, Array]], None]


class Inference:
    """Everything between a request and the models."""

    def __init__(
        self, models: Models, *, record_latency: Callable[[float], None], record_failure: Callable[[], None]
    ) -> None:
        self._models = models
        self._record_latency = record_latency
        self._record_failure = record_failure
        self._batcher = TickBatcher(WAITING_MAX)

    def begin(self, request: Request, name: str, version: str | None, remember: Remember | None) -> None:
        """Answer `request` when the models come to it.

        Args:
            request: For the model `name`.
            name: As the address has it.
            version: None for whichever the split decides.
            remember: Told of the request once it is answered, if anything is kept.

        Raises:
            AgentError: It is not answered.
        """
        started_s = time.perf_counter()
        model: Model | None = None
        try:
            try:
                asked = oip.parse_infer_request(request.body, request.head.headers.get(_LENGTH_HEADER))
            except AgentError:
                model = self._models.select(name, version)  # that it is not here is the better reason
                raise
            key = request.head.headers.get(b"edge-key")
            # Held for the whole request: it may be swapped meanwhile.
            model = self._models.select(name, version, key=asked.key if key is None else key.decode("latin-1"))
            model.check(asked.inputs)
            rows = len(next(iter(asked.inputs.values())))
            finish = partial(self._finish, request, asked, remember)
            self._batcher.add(Job(model, asked.inputs, rows, started_s, finish), is_alone=request.is_alone)
        except AgentError:
            self._count_failure(model, started_s)
            raise

    def _finish(
        self,
        request: Request,
        asked: oip.InferRequest,
        remember: Remember | None,
        job: Job,
        found: Outputs | AgentError,
    ) -> None:
        """Answer with the outputs found, or with the reason that there are none."""
        try:
            if isinstance(found, AgentError):
                raise found
            feedback_id = uuid.uuid4().hex if remember else ""
            response = oip.build_infer_response(job.model.manifest, asked, found, feedback_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
            self._count_failure(job.model, job.started_s)
            request.reply(answer_failure(error))
            return
        if response.json_bytes is None:
            request.reply(Answer(response.body))
        else:
            request.reply(Answer(response.body, 200, BINARY, b"%b: %d\r\n" % (_LENGTH_HEADER, response.json_bytes)))
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
