"""A version answers in the shadow for its time before it takes over, and ends there as its release or its owner wants."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.updates.machine import Phase
from edge_agent.updates.slots import TRIES
from models.contract.messages import EventKind
from models.contract.terms import ProbationRules, ReleaseTerms
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import BIG, Device, ReleaseServer

HOUR = ProbationRules(seconds=3600, min_agreement=Decimal("0.9"), max_latency_ratio=Decimal(2))
SECOND = ProbationRules(seconds=1)
NUMBERS = "it agrees in 0.5 of 1234 rows"


@pytest.fixture
def device(tmp_path: Path, broker: MemoryBroker, server: ReleaseServer) -> Device:
    """A device on version 1."""
    device = Device(tmp_path / "device", broker, server.root)
    device.receive(server.release(server.write_version(1, b"one" + BIG)))
    device.events.clear()
    return device


def restart(device: Device, broker: MemoryBroker, server: ReleaseServer, **settings: object) -> Device:
    return Device(device.path, broker, server.root, **settings)


def offer_second(server: ReleaseServer, rules: ProbationRules) -> bytes:
    terms = ReleaseTerms(role="champion", version=2, probation=rules)
    return server.release_with({server.write_version(2, b"two" + BIG): terms})


def offer_instead(server: ReleaseServer, version: Path, number: int) -> bytes:
    """Return an offer of `version` alone; the broker keeps what the one before led to."""
    held = dict(server.broker.retained)
    offer = server.release_with({version: ReleaseTerms(role="champion", version=number)})
    server.broker.retained |= {topic: data for topic, data in held.items() if topic not in server.broker.retained}
    return offer


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the updater has no reason to tell a test
            await asyncio.sleep(0.01)


def play(device: Device, *offers: bytes, then: Callable[[], Awaitable[None]] | None = None) -> None:
    """Start, handle `offers`, wait for the shadow, do `then` and end."""

    async def scenario() -> None:
        await device.updater.start()
        for offer in offers:
            await device.updater.handle_offer(offer)
        await until(lambda: device.shadowed is not None)
        if then is not None:
            await then()
        await device.updater.close()

    asyncio.run(scenario())


def test_version_serves_after_its_time_in_the_shadow_and_not_before(server: ReleaseServer, device: Device) -> None:
    async def wait() -> None:
        assert (device.version, device.tried[-1], device.updater.phase) == (1, b"one" + BIG, Phase.PROBATION)
        assert device.events[-1] == (EventKind.UPDATING, "1 s on probation, in the shadow", 2)
        await until(lambda: device.version == 2)

    play(device, offer_second(server, SECOND), then=wait)
    assert device.checked[-1][1] == SECOND
    assert device.shadowed is not None
    assert not device.shadowed.is_open
    assert (device.events[-1][0], device.serving) == (EventKind.UPDATED, b"two" + BIG)


def test_first_version_of_a_device_has_nobody_to_stand_behind(
    broker: MemoryBroker, server: ReleaseServer, tmp_path: Path
) -> None:
    device = Device(tmp_path / "device", broker, server.root)
    assert device.receive(offer_second(server, HOUR))[-1] is EventKind.UPDATED


@pytest.mark.parametrize("shares_quality", [False, True])
def test_version_that_fails_in_the_shadow_is_never_fetched_again_and_why_stays_with_the_owner(
    broker: MemoryBroker,
    server: ReleaseServer,
    device: Device,
    caplog: pytest.LogCaptureFixture,
    *,
    shares_quality: bool,
) -> None:
    device = restart(device, broker, server, shares_quality=shares_quality)
    offer = offer_second(server, HOUR)

    async def fail() -> None:
        assert device.shadowed is not None
        device.shadowed.reason = NUMBERS
        device.shadowed.fail()
        await until(lambda: device.updater.phase is Phase.IDLE)
        broker.reads.clear()
        await device.updater.handle_offer(offer)

    play(device, offer, then=fail)
    said = "it did not pass its probation" + (f": {NUMBERS}" if shares_quality else "")
    failed = [event for event in device.events if event[0] is EventKind.FAILED]
    said = f"rolled back and never tried again: {said}; version 1 serves on"
    assert failed == [(EventKind.FAILED, said, 2)]
    assert NUMBERS in caplog.text
    assert (device.version, device.tried, broker.reads) == (1, [], [])


def test_version_that_is_offered_no_more_leaves_the_shadow_and_may_come_again(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer, first = offer_second(server, HOUR), server.directory.path / "versions" / "digits" / "1"
    halted = offer_instead(server, first, 1)

    async def halt() -> None:
        await device.updater.handle_offer(offer)  # the same one again changes nothing
        assert device.updater.phase is Phase.PROBATION
        await device.updater.handle_offer(halted)
        await until(lambda: device.updater.phase is Phase.IDLE)

    play(device, offer, then=halt)
    said = "version 1 serves on: version 2 is offered no more"
    assert device.events[-1] == (EventKind.UPDATED, said, 1)
    assert (device.version, device.serving, device.updater._slots.trial) == (1, b"one" + BIG, None)
    assert not device.updater._slots.rejected
    again = offer_instead(server, server.directory.path / "versions" / "digits" / "2", 2)
    assert device.receive(again)[-1] is EventKind.UPDATED


@pytest.mark.parametrize("rules", [ProbationRules(), HOUR])
def test_version_that_is_offered_no_more_during_its_check_neither_serves_nor_enters_the_shadow(
    server: ReleaseServer, device: Device, monkeypatch: pytest.MonkeyPatch, rules: ProbationRules
) -> None:
    offer, first = offer_second(server, rules), server.directory.path / "versions" / "digits" / "1"
    halted = offer_instead(server, first, 1)
    checking, checked = threading.Event(), threading.Event()

    def check(*_: object) -> None:
        checking.set()
        assert checked.wait(10)

    monkeypatch.setattr(device.updater._probation, "_check_version", check)

    async def withdraw() -> None:
        offered = asyncio.create_task(device.updater.handle_offer(offer))
        await until(checking.is_set)
        halting = asyncio.create_task(device.updater.handle_offer(halted))
        await until(lambda: device.updater._trials._wanted != device.updater._slots.get_trial().digest)
        checked.set()
        await asyncio.gather(offered, halting)
        await device.updater.close()

    asyncio.run(withdraw())
    assert device.events[-1] == (EventKind.UPDATED, "version 1 serves on: version 2 is offered no more", 1)
    assert (device.version, device.serving, device.shadowed) == (1, b"one" + BIG, None)
    assert (device.updater._slots.trial, device.updater._slots.rejected) == (None, frozenset())


def test_power_cuts_in_the_shadow_are_not_held_against_the_version(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    play(device, offer_second(server, HOUR))
    for _ in range(TRIES + 1):
        device = restart(device, broker, server)

        async def cut_power(device: Device = device) -> None:
            await device.updater.start()
            await until(lambda: device.shadowed is not None)
            assert device.updater._slots.get_trial().tries_left == TRIES
            # not closed

        asyncio.run(cut_power())
    assert not device.updater._slots.rejected


def test_newer_version_takes_the_place_of_the_one_in_the_shadow(server: ReleaseServer, device: Device) -> None:
    offer, newer = offer_second(server, HOUR), offer_instead(server, server.write_version(3, b"three"), 3)

    async def go_on() -> None:
        await device.updater.handle_offer(newer)
        await until(lambda: device.version == 3)

    play(device, offer, then=go_on)
    assert device.tried[-1] == b"three"
    assert b"two" + BIG not in device.tried


def test_agent_that_ends_in_good_order_takes_no_try_and_the_next_one_begins_the_probation_again(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    play(device, offer_second(server, SECOND))
    assert device.updater._slots.get_trial().tries_left == 3
    again = restart(device, broker, server)

    async def wait() -> None:
        assert again.checked == [("b", SECOND)]
        await until(lambda: again.version == 2)

    play(again, then=wait)


def test_rules_that_time_a_version_reach_its_first_trial(server: ReleaseServer, device: Device) -> None:
    rules = replace(HOUR, seconds=0, min_agreement=Decimal(0))
    assert device.receive(offer_second(server, rules))[-1] is EventKind.UPDATED
    assert device.checked[-1] == ("b", rules)


def test_device_says_once_that_it_cannot_go_back_to_a_version_that_failed_here(
    server: ReleaseServer, device: Device
) -> None:
    bad = server.write_version(2, b"unhealthy")
    device.receive(server.release(bad))
    device.receive(server.release(server.write_version(3, b"three")))
    device.events.clear()
    offer = server.release(bad)
    assert device.receive(offer, offer) == [EventKind.FAILED]
    assert "version 2 failed its trial here once and is never tried again; version 3 serves on" in device.last_message
