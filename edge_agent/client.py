"""Asks a running agent, over its Unix socket."""

import http.client
import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edge_agent.errors import AgentError, RequestError, TransientError

TIMEOUT_S = 30.0


class AgentClient:
    """One connection to the agent at a Unix socket; a context."""

    def __init__(self, uds_path: Path) -> None:
        self._uds_path = uds_path
        self._connection = _UnixConnection(uds_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, path: str) -> Any:
        """Return the JSON document at `path`; raises AgentError."""
        return self._request("GET", path, None)

    def post(self, path: str, document: object) -> Any:
        """Return the answer to `document`, which may be JSON already; raises AgentError."""
        return self._request("POST", path, document if isinstance(document, bytes) else json.dumps(document).encode())

    def _request(self, method: str, path: str, body: bytes | None) -> Any:
        try:
            self._connection.request(method, path, body)
            response = self._connection.getresponse()
            status, data = response.status, response.read()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise AgentError(f"no agent answers on {self._uds_path}: is `edge-agent run` running?") from error
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"the agent on {self._uds_path} did not answer: {error}") from error
        document = _parse(data)
        if status != http.client.OK:
            raise RequestError(str(document.get("error", f"HTTP status {status}")), status=status)
        return document


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


def _parse(data: bytes) -> Any:
    try:
        document = json.loads(data)
    except ValueError as error:
        raise AgentError(f"the agent answered something that is not JSON: {data[:80]!r}") from error
    if not isinstance(document, dict):
        raise AgentError(f"the agent answered {data[:80]!r}, expected an object")
    return document
