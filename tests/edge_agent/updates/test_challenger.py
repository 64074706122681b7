"""From a signed challenger to slot c and the engine beside it, between a real repository and a broker in memory."""

import asyncio
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.updates.challenger_slot import Challenger
from edge_agent.updates.slots import TRIES
from fl_server.rollout.repository import _build_target
from models.contract.encoding import build_digest
from models.contract.manifest import MANIFEST_NAME, FileEntry
from models.contract.messages import EventKind
from models.contract.offer import ROLE_RELEASES, build_offer, build_release_target
from models.contract.terms import Split
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import BIG, Device, ReleaseServer

TENTH, SHADOW = Split(weight=Decimal("0.1")), Split(shadow=True)
SET, REFUSED, ENDED = EventKind.CHALLENGER_SET, EventKind.CHALLENGER_REFUSED, EventKind.CHALLENGER_ENDED


@pytest.fixture
def champion(server: ReleaseServer) -> Path:
    return server.write_version(1, b"one" + BIG)


@pytest.fixture
def rival(server: ReleaseServer) -> Path:
    return server.write_version(2, b"two" + BIG, graph=b"other")


@pytest.fixture
def device(tmp_path: Path, broker: MemoryBroker, server: ReleaseServer, champion: Path) -> Device:
    """A device on version 1."""
    device = Device(tmp_path / "device", broker, server.root)
    device.receive(server.release(champion))
    device.events.clear()
    return device


def restart(device: Device, broker: MemoryBroker, server: ReleaseServer, **options: object) -> Device:
    return Device(device.path, broker, server.root, **options)


def list_slot(device: Device) -> list[str]:
    return sorted(path.name for path in (device.path / "slots" / "c").iterdir())


def test_challenger_comes_beside_the_champion_changes_its_split_and_goes_again(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    assert device.receive(server.release(champion, challenger=rival, split=TENTH)) == [SET]
    assert device.events[-1] == (SET, "it stands beside the champion, with weight 0.1", 2)
    assert (device.version, device.serving) == (1, b"one" + BIG)
    assert device.challenger == (2, "with weight 0.1")
    assert list_slot(device) == ["evaluate.onnx", "inference.onnx", MANIFEST_NAME, "train_step.onnx"]
    broker.reads.clear()
    assert device.receive(server.release(champion, challenger=rival, split=SHADOW)) == [SET, SET]
    assert device.challenger == (2, "in the shadow")
    assert device.tried.count(b"two" + BIG) == 1
    assert broker.reads == []
    assert device.receive(server.release(champion))[-1] is ENDED
    assert device.challenger is None
    assert list_slot(device) == []
    assert device.version == 1


def test_same_challenger_again_does_nothing_and_after_a_restart_it_stands_without_an_offer_or_a_trial(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    offer = server.release(champion, challenger=rival, split=TENTH)
    device.receive(offer, offer)
    assert [kind for kind, _, _ in device.events] == [SET]
    device = restart(device, broker, server)
    broker.reads.clear()
    assert device.receive() == [SET]
    assert (device.challenger, device.tried) == ((2, "with weight 0.1"), [])
    assert device.receive(offer) == [SET]
    assert broker.reads == []


def test_promoted_challenger_is_not_fetched_again(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    device.receive(server.release(champion, challenger=rival, split=TENTH))
    offer = server.release(rival)
    broker.reads.clear()
    assert device.receive(offer)[-2:] == [EventKind.UPDATED, ENDED]
    assert broker.reads == []
    assert (device.version, device.serving, device.challenger) == (2, b"two" + BIG, None)


def test_next_challenger_takes_the_place_of_the_one_before(
    server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    device.receive(server.release(champion, challenger=rival, split=TENTH))
    third = server.write_version(3, b"three")
    assert device.receive(server.release(champion, challenger=third, split=TENTH)) == [SET, ENDED, SET]
    assert device.challenger == (3, "with weight 0.1")


def test_unhealthy_challenger_is_never_fetched_again_and_the_champion_answers_alone(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path
) -> None:
    offer = server.release(champion, challenger=server.write_version(2, b"unhealthy"), split=TENTH)
    assert device.receive(offer) == [REFUSED]
    assert device.events[-1] == (REFUSED, "never tried again: the output is not finite", 2)
    assert (device.version, device.challenger, list_slot(device)) == (1, None, [])
    for again in (device, restart(device, broker, server)):
        broker.reads.clear()
        seen = len(again.events)
        again.receive(offer)
        assert not broker.reads
        assert len(again.events) == seen


def test_what_cannot_be_fetched_now_comes_with_a_retry_and_the_champion_does_not_wait_for_it(
    broker: MemoryBroker, server: ReleaseServer, device: Device, rival: Path
) -> None:
    device = restart(device, broker, server, retry_delay_s=0.01)
    offer = server.release(server.write_version(3, b"three"), challenger=rival, split=TENTH)
    topic = broker.get_chunks(build_digest(b"two" + BIG))[0]
    chunk = broker.retained.pop(topic)

    async def receive() -> None:
        await device.updater.handle_offer(offer)
        assert (device.version, device.challenger) == (3, None)
        assert device.events[-1][0] is REFUSED
        broker.retained[topic] = chunk
        async with asyncio.timeout(10):
            while device.challenger is None:  # noqa: ASYNC110 - the updater has no reason to tell a test
                await asyncio.sleep(0.01)
        await device.updater.close()

    asyncio.run(receive())
    assert device.challenger == (2, "with weight 0.1")


def test_champion_of_a_newer_offer_does_not_wait_for_a_challenger_that_stalls(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    stalling = server.release(champion, challenger=rival, split=TENTH)
    broker.stalled.add(broker.get_chunks(build_digest(b"two" + BIG))[0])
    blobs = dict(broker.retained)
    overtaken = server.write_version(4, b"four")
    between = server.release(champion, challenger=overtaken, split=TENTH)
    newer = server.release(server.write_version(3, b"three"))
    broker.retained |= blobs

    async def receive() -> None:
        first = asyncio.create_task(device.updater.handle_offer(stalling))
        await broker.wait_until_stalled()
        second = asyncio.create_task(device.updater.handle_offer(between))
        third = asyncio.create_task(device.updater.handle_offer(newer))
        async with asyncio.timeout(10):
            while device.version != 3:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        broker.release()
        await asyncio.gather(first, second, third)

    asyncio.run(receive())
    assert device.challenger is None
    assert list_slot(device) == []
    manifest_digest = build_digest((overtaken / MANIFEST_NAME).read_bytes())
    assert not any(manifest_digest in topic for topic in broker.reads), "it was overtaken"


def test_device_that_is_too_busy_for_a_trial_keeps_all_tries(
    server: ReleaseServer, device: Device, champion: Path, rival: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = server.release(champion, challenger=rival, split=TENTH)

    def be_busy(_: Challenger | None) -> None:
        raise TransientError("this device is too busy")

    monkeypatch.setattr(device.updater._challenger, "_serve", be_busy)
    assert device.receive(*[offer] * (TRIES + 1)) == [REFUSED] * (TRIES + 1)
    monkeypatch.undo()
    assert device.receive(offer)[-1] is SET


def test_owner_with_a_challenger_keeps_it_and_says_so_once(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    device = restart(device, broker, server, owner_challenges=True)
    offer = server.release(champion, challenger=rival, split=TENTH)
    broker.reads.clear()
    assert device.receive(offer, offer) == [REFUSED]
    assert device.events[-1] == (REFUSED, "the owner's own, [serving] challenger, stays", 2)
    assert broker.reads == []


def sign_custom(server: ReleaseServer, version: Path, custom: object) -> bytes:
    """Return an offer whose challenger is signed with any `custom`."""
    data = (version / MANIFEST_NAME).read_bytes()
    state = server.repository._store.load()
    path = build_release_target("digits", "challenger")
    entry = FileEntry(digest=build_digest(data), size_bytes=len(data))
    state.targets[ROLE_RELEASES].targets[path] = _build_target(path, entry, custom)
    server.repository._issue(state, {ROLE_RELEASES}, server.now)
    return build_offer(server.repository.load_metadata())


@pytest.mark.parametrize(
    ("custom", "said"),
    [
        (None, "expected `object`, got `null`"),
        ([], "expected `object`, got `array`"),
        ({"version": 2}, "without a split"),
        ({"version": 2, "role": "challenger", "split": {"weight": "2"}}, "weight is 2, must be in 0..1"),
        ({"version": 2, "role": "challenger", "split": {"weight": "a"}}, "terms of a release"),
        ({"version": 2, "role": "challenger"}, "a challenger has a split"),
    ],
)
def test_challenger_signed_with_terms_that_make_no_sense_is_one_line_and_no_challenger(
    server: ReleaseServer, device: Device, rival: Path, custom: object, said: str
) -> None:
    assert device.receive(sign_custom(server, rival, custom)) == [REFUSED]
    assert said in device.last_message.lower()
    assert "\n" not in device.last_message
    assert (device.version, device.challenger) == (1, None)


def test_challenger_whose_graphs_are_not_signed_is_refused(
    server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    assert device.receive(server.release(champion, challenger=rival, split=TENTH, signs_graphs=False)) == [REFUSED]
    assert "is not signed by the offline role" in device.last_message


@pytest.mark.parametrize("damage", [lambda slots: (slots / "c/inference.onnx").write_bytes(b"owt"),
                                    lambda slots: (slots / "challenger.json").write_bytes(b"\0" * 40)])  # fmt: skip
def test_damaged_slot_leaves_the_champion_alone_and_heals_with_the_next_offer(
    broker: MemoryBroker,
    server: ReleaseServer,
    device: Device,
    champion: Path,
    rival: Path,
    damage: Callable[[Path], object],
) -> None:
    offer = server.release(champion, challenger=rival, split=TENTH)
    device.receive(offer)
    damage(device.path / "slots")
    device = restart(device, broker, server)
    device.receive()
    assert (device.version, device.challenger) == (1, None)
    assert device.receive(offer)[-1] is SET


@pytest.mark.parametrize(("name", "said"), [("challenger.json", "challenger.json is unreadable"), ("c", "File exists")])
def test_slot_that_the_disk_does_not_give_costs_the_challenger_and_not_the_agent(
    broker: MemoryBroker,
    server: ReleaseServer,
    device: Device,
    champion: Path,
    rival: Path,
    name: str,
    said: str,
) -> None:
    path = device.path / "slots" / name
    if name == "c":
        path.write_bytes(b"")
    else:
        path.mkdir()
    device = restart(device, broker, server)
    assert REFUSED in device.receive(server.release(champion, challenger=rival, split=TENTH))
    assert said in device.events[0][1]
    assert (device.version, device.challenger) == (1, None)


def test_challenger_that_ends_the_agent_while_it_serves_does_so_three_times_at_most(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    offer = server.release(champion, challenger=rival, split=TENTH)
    device.receive(offer)
    for _ in range(TRIES):
        device = restart(device, broker, server)
        asyncio.run(device.updater.start())  # killed: not closed
        assert device.challenger == (2, "with weight 0.1")
    device = restart(device, broker, server)
    assert device.receive(offer) == [REFUSED]
    assert device.last_message == "never tried again: it ended the agent 3 times"
    assert (device.version, device.challenger) == (1, None)


def test_challenger_that_has_served_for_a_while_is_not_blamed_for_the_power_cuts_after_it(
    broker: MemoryBroker, server: ReleaseServer, device: Device, champion: Path, rival: Path
) -> None:
    offer = server.release(champion, challenger=rival, split=TENTH)
    device.receive(offer)

    async def serve_for_a_while() -> None:
        await device.updater.start()
        slot = device.updater._challenger._slot
        async with asyncio.timeout(10):
            while slot.get_held().tries_left < TRIES:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        await device.updater.handle_offer(offer)

    for _ in range(TRIES + 1):
        device = restart(device, broker, server, steady_s=0.01)
        asyncio.run(serve_for_a_while())
        assert device.events == [(SET, "it stands beside the champion, with weight 0.1", 2)]
