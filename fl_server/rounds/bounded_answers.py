"""Answers of the SuperLink are read only if they are short enough: what a device sent decides how long they are."""

from collections.abc import Callable
from typing import Any

import httpx

from fl_server.errors import RunError


class OversizedError(RunError):
    """The answer is longer than it may be; none of it was read."""


class BoundedAnswers:
    """The innermost interceptor of a Flower client: it sends the request itself, to see the answer's length first."""

    def __init__(self, http: httpx.Client, choose_limit: Callable[[Any], int]) -> None:
        """Prepare; `choose_limit` gets the request's message, and returns the answer's longest body, bytes."""
        self._http, self._choose_limit = http, choose_limit

    def intercept(self, context: Any, _call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Return the whole answer; raises OversizedError."""
        limit = self._choose_limit(context.message)
        response = self._http.send(context.request, stream=True)
        try:
            length = response.headers.get("content-length", "unknown")
            if not length.isdecimal() or int(length) > limit:
                raise OversizedError(f"an answer of {length} bytes, at most {limit} are read")
            response.read()
        finally:
            response.close()
        return response
