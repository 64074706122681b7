"""Whether this machine has what both services need: a clock, a disk, ports, and a way to the broker."""

import contextlib
import ctypes
import os
import shutil
import socket
import ssl
import tempfile
import time
from datetime import datetime
from pathlib import Path

from models.doctor.findings import Finding, fail, ok, warn

FREE_LEAST_BYTES = 256 * 1024**2
SYNC_SLOW_S = 1.0
ANSWER_TIMEOUT_S = 5.0
REFUSAL_TIMEOUT_S = 1.0  # a server that refuses a certificate says so at once
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized
_TIMEX_BYTES = 512  # more than any struct timex has
# MQTT 5 CONNECT of a clean session without an identifier: the broker makes one up, or takes the certificate's name.
_CONNECT = b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00"
_CONNACK_KIND = 0x20
_SUCCESS = 0


def check_clock(*, now: datetime, signed_at: datetime | None) -> Finding:
    """Return whether `now`, aware, may be true.

    Args:
        now: What the clock says.
        signed_at: The newest signed time that was seen here; None if none was.
    """
    shown = f"{now:%Y-%m-%d %H:%M}Z"
    if signed_at is not None and now < signed_at:
        return fail("clock", f"{shown}, and {signed_at:%Y-%m-%d %H:%M}Z has been signed already", "set it; install NTP")
    is_synchronized = _is_synchronized()
    if is_synchronized is None:
        return ok("clock", f"{shown}; whether NTP keeps it is not known")
    if not is_synchronized:
        return warn(
            "clock", f"{shown}, not synchronized", "install chrony or systemd-timesyncd: Flower takes 300 s of error"
        )
    return ok("clock", f"{shown}, synchronized")


def check_disk(directory: Path) -> Finding:
    """Return whether `directory` has room, and takes a file and syncs it."""
    try:
        free_bytes = shutil.disk_usage(directory).free
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor.") as file:
            begins = time.monotonic()
            file.write(os.urandom(4096))
            file.flush()
            os.fsync(file.fileno())
            took_s = time.monotonic() - begins
    except OSError as error:
        return fail("disk", f"{directory}: {error.strerror}", "free some space, or make the folder the service's own")
    found = f"{free_bytes / 1024**2:.0f} MiB free, a write is synced in {1000 * took_s:.1f} ms"
    if free_bytes < FREE_LEAST_BYTES:
        return warn("disk", found, "free some space: full, neither samples nor releases are kept")
    if took_s > SYNC_SLOW_S:
        return warn("disk", found, "a worn flash card? everything that is promised waits for it")
    return ok("disk", found)


def check_private(directory: Path) -> Finding:
    """Return whether `directory` is closed to those who are neither its owner nor in its group."""
    try:
        mode = directory.stat().st_mode & 0o777
    except OSError as error:
        return fail("permissions", f"{directory}: {error.strerror}", "run this as the service's user or as root")
    if mode & 0o007:
        return fail("permissions", f"{directory} has mode {mode:04o}: others may look in", f"chmod o= {directory}")
    return ok("permissions", f"{directory} has mode {mode:04o}")


def check_port_free(host: str, port: int, *, key: str) -> Finding:
    """Return whether a service could listen on `port` of `host`; `key` is how the configuration calls it."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        return fail(f"port {port}", f"{host}: {error.strerror}", f"end what listens there, or change {key}")
    return ok(f"port {port}", f"free on {host}")


def check_broker(host: str, port: int, context: ssl.SSLContext | None, *, is_running: bool = False) -> Finding:
    """Return whether an MQTT 5 broker lets this machine in.

    Args:
        host: By which name its certificate is checked, too.
        port: Of the broker.
        context: For TLS; None for none.
        is_running: Whether the service holds a session there under the same certificate: a second one of that name
            would end it, so that no more is done than to connect.
    """
    address, how = f"{host}:{port}", "without TLS" if context is None else "over TLS"
    try:
        with socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S) as plain:
            stream = plain if context is None else context.wrap_socket(plain, server_hostname=host)
            with stream:
                if is_running:
                    return _await_refusal(stream, address, how)
                stream.sendall(_CONNECT)
                answer = stream.recv(16)
    except ssl.SSLError as error:
        advice = "compare the certificates of both sides: same authority, not expired, not revoked, right host name"
        return fail("broker", f"{address}: {error.reason or error}", advice)
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        return fail("broker", f"{address}: {reason}", "is it running, is its port open, is [broker] right?")
    if len(answer) < 4 or answer[0] != _CONNACK_KIND:
        return fail("broker", f"{address} answers, but not as an MQTT 5 broker {how}", "is [broker] right?")
    if answer[3] != _SUCCESS:
        advice = "its log says why; it must know this certificate's or address's owner"
        return fail("broker", f"{address} refuses with reason code 0x{answer[3]:02x}", advice)
    return ok("broker", f"{address} answers {how}")


def _await_refusal(stream: socket.socket, address: str, how: str) -> Finding:
    stream.settimeout(REFUSAL_TIMEOUT_S)
    with contextlib.suppress(TimeoutError):
        if not stream.recv(1):
            return fail("broker", f"{address} hangs up {how}", "its log says why")
    return ok("broker", f"{address} takes connections {how}; the service has its own")


def _is_synchronized() -> bool | None:
    """Return whether the kernel's clock is kept by NTP; None if the kernel does not say."""
    state: int = getattr(ctypes.CDLL(None), "adjtimex", lambda _: -1)(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else state != _TIME_ERROR
