"""Clients of the SuperLink's interfaces, which try again for a while, and how their errors are told."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient

from fl_server.errors import RunError

RETRY_FIRST_S, RETRY_MAX_S, RETRY_TOTAL_S = 0.1, 1.0, 5.0


class SessionLostError(RunError):
    """The SuperLink went away or no longer knows the run: open another session and ask again."""


def connect_control(address: str, ca_path: Path) -> ControlHttpClient:
    """Return a client of the interface that registers nodes and opens runs."""
    return ControlHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=ca_path.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        retry_invoker=_build_retries(),
    )


def connect_runtime(address: str, ca_path: Path, interceptors: Sequence[Any], *, name: str) -> RuntimeHttpClient:
    """Return a client of the interface that runs are driven through."""
    return RuntimeHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=ca_path.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name=name), *interceptors],
        retry_invoker=_build_retries(),
    )


@contextmanager
def lost_on_error(what: str) -> Iterator[None]:
    """Raise SessionLostError, which says `what` is not done, for whatever goes wrong between here and the SuperLink."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise SessionLostError(f"{what}: the SuperLink answered HTTP {error.response.status_code}") from error
    except httpx.HTTPError as error:
        raise SessionLostError(f"{what}: {error or type(error).__name__}") from error


def _build_retries() -> RetryInvoker:
    return RetryInvoker(
        lambda: exponential(base_delay=RETRY_FIRST_S, max_delay=RETRY_MAX_S),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=RETRY_TOTAL_S,
        should_giveup=lambda error: isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500,
    )
