"""What is sent back, and how an error becomes that."""

import logging
from dataclasses import dataclass
from typing import Final

import msgspec

from edge_agent.errors import AgentError, RequestError, TransientError

log = logging.getLogger(__name__)

JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"
PROMETHEUS: Final = b"text/plain; version=0.0.4; charset=utf-8"
_RETRY_AFTER_S = 1  # a queue of small models is empty long before


@dataclass(slots=True)
class Answer:
    """One answer.

    Attributes:
        headers: Whole lines, beside those that every answer has.
    """

    body: bytes
    status: int = 200
    content_type: bytes = JSON
    headers: bytes = b""


class MethodError(RequestError):
    """The address is right, the method is not."""

    def __init__(self, path: str, found: str, expected: str) -> None:
        super().__init__(f"{path:.200}: expected {expected}, got {found:.20}", status=405)
        self.expected = expected


def answer_json(document: object, *, status: int = 200) -> Answer:
    return Answer(msgspec.json.encode(document), status)


def answer_error(error: AgentError) -> Answer:
    """Return what tells a caller of `error`; one that is not the caller's is 503."""
    status = error.status if isinstance(error, RequestError) else 503
    return Answer(msgspec.json.encode({"error": str(error)}), status, JSON, _build_headers(error, status))


def answer_failure(error: Exception) -> Answer:
    """Return what tells a caller of `error`, be it one that nobody foresaw."""
    if isinstance(error, AgentError):
        return answer_error(error)
    log.error("a request could not be answered", exc_info=error)
    return answer_json({"error": "the agent failed on this request; its log says why"}, status=500)


def _build_headers(error: AgentError, status: int) -> bytes:
    if isinstance(error, MethodError):
        return b"allow: %b\r\n" % error.expected.encode()
    if status == 401:
        return b"www-authenticate: Bearer\r\n"
    if status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, TransientError) else _RETRY_AFTER_S
        return b"retry-after: %d\r\n" % max(1, round(wait_s))
    return b""
