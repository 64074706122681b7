"""What a service tells systemd: that it is ready, that it ends, and that its event loop still turns.

The datagrams of sd_notify(3); without `NOTIFY_SOCKET` nothing is said.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

READY = "READY=1"
STOPPING = "STOPPING=1"
_WATCHDOG = "WATCHDOG=1"
_BEATS = 3  # within the time that systemd waits for one

log = logging.getLogger(__name__)


def notify(state: str, *, environment: Mapping[str, str] = os.environ) -> None:
    """Send `state` to who started this service; one who does not listen is logged and no more."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("NOTIFY_SOCKET: %s is not told: %s", state, error.strerror or error)


async def feed_watchdog(*, environment: Mapping[str, str] = os.environ) -> None:
    """Say at each third of `WATCHDOG_USEC` that this loop turns, until cancelled; return at once without a watchdog."""
    timeout_us = environment.get("WATCHDOG_USEC", "")
    if not timeout_us.isdecimal() or environment.get("WATCHDOG_PID") not in {None, str(os.getpid())}:
        return
    while True:
        notify(_WATCHDOG, environment=environment)
        await asyncio.sleep(int(timeout_us) / 1e6 / _BEATS)
