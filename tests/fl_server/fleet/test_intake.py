import asyncio
import os
import signal
import sqlite3
import threading
from dataclasses import replace
from decimal import Decimal

import pytest

from fl_server.fleet.intake import Intake, Kept
from fl_server.fleet.mqtt import FromDevice
from fl_server.fleet.roster import Roster, RosterError
from models.contract.ledger import SPENT_MAX, LedgerHead, Spent
from models.contract.messages import Event, EventKind, Status, Telemetry

STATUS = Status(sent_at=1.0, online=True, agent="0.1", model="digits")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "coordinator.db"
    with Roster(path) as roster:
        for number in (1, 2):
            with roster.enrolling(f"device-{number}", b"key"):
                pass
    return path


def build_event(event_id: str, **changed) -> Event:
    return Event(id=event_id, sent_at=1.0, kind=EventKind.UPDATED, message="version 2", **changed)


def build_telemetry(uptime_s: float) -> Telemetry:
    return Telemetry(id=str(uptime_s), sent_at=1.0, uptime_s=uptime_s, rss_mb=60.0, model="digits")


def say(number: int, document) -> FromDevice:
    return FromDevice(device_id=f"device-{number}", document=document)


def keep(path, *batches: list[FromDevice]) -> list[list[Kept]]:
    async def scenario():
        with Intake(path) as intake:
            return [await intake.keep(batch) for batch in batches]

    return asyncio.run(scenario())


def test_batch_is_kept_in_order_each_event_once_and_of_telemetry_the_last(path):
    offline = Status(sent_at=2.0, online=False, agent="0.1", model="digits")
    batch = [
        *(say(1, STATUS), say(1, build_event("a")), say(2, build_event("a")), say(1, build_telemetry(1.0))),
        *(say(1, build_event("a")), say(1, offline), say(3, STATUS), say(1, build_telemetry(2.0))),
    ]
    kept, again = keep(path, batch, [say(1, build_event("a"))])
    assert [(item.device_id, item.document, item.is_new) for item in kept] == [
        ("device-1", STATUS, False),
        ("device-1", build_event("a"), True),
        ("device-2", build_event("a"), True),
        ("device-1", build_event("a"), False),
        ("device-1", offline, False),
    ]
    assert [kept[0].before, kept[-1].before] == [None, STATUS]
    assert [item.is_new for item in again] == [False]
    with Roster(path) as roster:
        first, second = roster.list_devices()
        assert (first.status, first.telemetry, second.telemetry) == (offline, build_telemetry(2.0), None)
        assert [event.id for event in roster.list_events("device-1")] == ["a"]


def test_batch_that_fails_is_not_kept_in_part_and_the_next_is(path):
    async def scenario():
        with Intake(path) as intake:
            await intake.keep([])
            with sqlite3.connect(path) as database:
                database.execute("ALTER TABLE events RENAME TO mislaid")
            with pytest.raises(sqlite3.Error):
                await intake.keep([say(1, STATUS), say(1, build_event("a"))])
            with Roster(path) as roster, sqlite3.connect(path) as database:
                assert roster.list_devices()[0].status is None
                database.execute("DROP TABLE events")
                database.execute("ALTER TABLE mislaid RENAME TO events")
            assert len(await intake.keep([say(1, STATUS), say(1, build_event("a"))])) == 2

    asyncio.run(scenario())


def test_ledger_that_cannot_be_kept_costs_neither_its_event_nor_the_batch(path):
    kinds = [
        Spent(model=f"m{number:02}", sampling_rate=Decimal("0.5"), noise_multiplier=Decimal(1), steps=1)
        for number in range(SPENT_MAX + 1)
    ]
    known = LedgerHead(entries=1, digest="e" * 64, spent=tuple(kinds[:-1]))
    more = LedgerHead(entries=2, digest="f" * 64, spent=(kinds[-1],))
    [kept] = keep(
        path,
        [
            say(1, build_event("a", run="r", round=1, ledger=known)),
            say(1, build_event("b", run="r", round=2, ledger=more)),
            say(2, build_event("c", run="r", round=2, ledger=more)),
        ],
    )
    assert [item.is_new for item in kept] == [True] * 3
    with Roster(path) as roster:
        assert roster.get_ledger("device-1") == known
        assert roster.get_ledger("device-2") == more


def test_ledger_beyond_what_numbers_hold_costs_neither_its_event_nor_the_batch(path):
    most = Spent(model="m", sampling_rate=Decimal("0.5"), noise_multiplier=Decimal(1), steps=2**53 - 1)
    with Roster(path) as roster:
        roster.save_update("device-1", "r", 2, replace(most, steps=1))
    head = LedgerHead(entries=1, digest="e" * 64, spent=(most,))
    [kept] = keep(path, [say(1, build_event("a", run="r", round=1, ledger=head)), say(2, STATUS)])
    assert [item.device_id for item in kept] == ["device-1", "device-2"]


def test_loop_turns_while_another_command_holds_the_database(path):
    async def scenario():
        holder = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with Intake(path) as intake:
            keeping = asyncio.create_task(intake.keep([say(1, STATUS)]))
            for _ in range(1000):  # were it kept on this loop, no turn would come
                await asyncio.sleep(0)
            assert not keeping.done()
            holder.execute("COMMIT")
            assert len(await keeping) == 1
        holder.close()

    asyncio.run(scenario())
    assert "intake" not in {thread.name.partition("_")[0] for thread in threading.enumerate()}


def test_what_was_kept_is_on_disk(path):
    child = os.fork()
    if child == 0:
        asyncio.run(_keep_and_die(path))
    os.waitpid(child, 0)
    with Roster(path) as roster:
        assert [event.id for event in roster.list_events("device-1")] == ["a"]


async def _keep_and_die(path) -> None:
    with Intake(path) as intake:
        await intake.keep([say(1, build_event("a"))])
        os.kill(os.getpid(), signal.SIGKILL)


def test_part_of_a_batch_is_undone_alone(path):
    with Roster(path) as roster:
        with roster.batch():
            roster.save_status("device-1", STATUS)
            with pytest.raises(RosterError), roster.enrolling("device-2", b"key"):
                pass
        assert roster.list_devices()[0].status == STATUS
