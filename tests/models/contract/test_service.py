import asyncio
import contextlib
import os
import time
from pathlib import Path

import pytest

from models.contract.service import READY, feed_watchdog, notify
from tests.simulators.notify_socket import NotifySocket
from tests.simulators.waiting import wait_until

WATCHDOG = "WATCHDOG=1"


def test_a_service_that_nobody_listens_to_says_nothing_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notify(READY, environment={})
    assert not caplog.records
    notify(READY, environment={"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert READY in caplog.text


async def feed_until_hung(listener: NotifySocket, environment: dict[str, str]) -> None:
    feeding = asyncio.create_task(feed_watchdog(environment=environment))
    while not listener.has_heard(WATCHDOG, times=3):  # noqa: ASYNC110 - the socket is not the loop's
        await asyncio.sleep(0.001)
    heard, ends = len(listener.said), time.monotonic() + 3 * 0.05
    while time.monotonic() < ends:  # the loop hangs for three times what systemd waits
        assert not listener.has_heard(WATCHDOG, times=heard + 1)
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding


def test_the_watchdog_is_fed_by_the_loop_and_by_no_thread_of_its_own(tmp_path: Path) -> None:
    with NotifySocket(tmp_path / "n", watchdog_s=0.05) as listener:
        asyncio.run(feed_until_hung(listener, {**listener.environment, "WATCHDOG_PID": str(os.getpid())}))


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
def test_without_a_watchdog_of_its_own_a_service_feeds_none(environment: dict[str, str]) -> None:
    asyncio.run(asyncio.wait_for(feed_watchdog(environment=environment), 5))


def test_an_abstract_address_is_understood(tmp_path: Path) -> None:
    name = f"edge-fl-test-{os.getpid()}"
    with NotifySocket(Path(f"\0{name}"), watchdog_s=1) as listener:
        notify(READY, environment={"NOTIFY_SOCKET": f"@{name}"})
        wait_until(lambda: listener.has_heard(READY), "the service to be ready")
