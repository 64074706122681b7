"""A release through a real broker, with the links that agent and coordinator use."""

import asyncio
from decimal import Decimal
from pathlib import Path

from fl_server.fleet.mqtt import Connected
from fl_server.fleet.mqtt import Link as CoordinatorLink
from fl_server.rollout.publisher import Publisher, list_blobs
from models.contract.encoding import build_digest
from models.contract.messages import EventKind
from models.contract.terms import Split
from models.tensors.delta import build_delta
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.releases import BIG, FLEET, Device, ReleaseServer, running_device


def test_champion_and_challenger_reach_a_device_through_a_real_broker(tmp_path: Path) -> None:
    server = ReleaseServer(tmp_path / "server", MemoryBroker())
    champion, challenger = server.write_version(1, b"one" + BIG * 4), server.write_version(2, b"two" + BIG)
    offer = server.release(champion, challenger=challenger, split=Split(weight=Decimal("0.25")))
    pem = server.repository.build_coordinator_pem()
    blobs = {build_digest(pem): pem, **list_blobs(champion), **list_blobs(challenger)}
    with Mosquitto(tmp_path) as broker:
        device = asyncio.run(_release(tmp_path, broker.port, server, [(offer, blobs)]))
    assert device.events[-2:] == [
        (EventKind.UPDATED, "version 1 serves from slot a", 1),
        (EventKind.CHALLENGER_SET, "it stands beside the champion, with weight 0.25", 2),
    ]
    assert (tmp_path / "device" / "coordinator.pem").read_bytes() == pem


def test_release_and_the_delta_after_it_reach_a_device_through_a_real_broker(tmp_path: Path) -> None:
    server = ReleaseServer(tmp_path / "server", MemoryBroker())
    weights = BIG * 4
    first = server.write_version(1, b"one", weights=weights)
    second = server.write_version(
        2, b"one", weights=weights[::-1], deltas={weights: build_delta(weights, weights[::-1])}
    )
    pem = server.repository.build_coordinator_pem()
    releases = [
        (server.release(version), {build_digest(pem): pem, **list_blobs(version)}) for version in (first, second)
    ]
    whole = build_digest(weights[::-1])
    releases[1][1].pop(whole)  # a broker without it: nothing but the delta leads there
    with Mosquitto(tmp_path) as broker:
        device = asyncio.run(_release(tmp_path, broker.port, server, releases))
    updated = [message for kind, message, _ in device.events if kind is EventKind.UPDATED]
    assert updated == ["version 1 serves from slot a", "version 2 serves from slot b"]
    assert device.serving == b"one" + weights[::-1]
    assert (tmp_path / "device" / "coordinator.pem").read_bytes() == pem


async def _release(
    tmp_path: Path, port: int, server: ReleaseServer, releases: list[tuple[bytes, dict[str, Path | bytes]]]
) -> Device:
    async with (
        running_device(tmp_path / "device", port, server.root) as (device, offers),
        asyncio.timeout(30),
        CoordinatorLink(host="127.0.0.1", port=port, fleet=FLEET) as coordinator,
    ):
        while Connected() not in await coordinator.receive():
            pass
        publisher = Publisher(fleet=FLEET, record_path=tmp_path / "published.json", publish=coordinator.publish)
        for offer, blobs in releases:
            await publisher.publish(offer, blobs)
            await device.updater.handle_offer(await offers.get())
    return device
