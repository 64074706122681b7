"""What the broker holds of a fleet's releases."""

import asyncio
from pathlib import Path

import pytest

from fl_server.errors import ServerError
from fl_server.rollout.publisher import Publisher, count_pushed_bytes, list_blobs, plan_publication
from models.contract.encoding import build_digest
from models.contract.manifest import parse_manifest
from models.contract.topics import build_blob_topic, build_offer_topic
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import BIG, FLEET, ReleaseServer

OLD, NEW = b"old" + BIG, b"new" + BIG
OFFER_TOPIC = build_offer_topic(FLEET)


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def build_publisher(tmp_path: Path, broker: MemoryBroker) -> Publisher:
    return Publisher(fleet=FLEET, record_path=tmp_path / "published.json", publish=broker.publish)


def by_digest(*contents: bytes) -> dict[str, Path | bytes]:
    return {build_digest(data): data for data in contents}


def topics_of(data: bytes) -> list[str]:
    return [build_blob_topic(FLEET, build_digest(data), index) for index in range(4)]


def test_plan_publishes_what_is_new_and_clears_what_only_older_offers_led_to() -> None:
    old, kept, new = sorted(build_digest(data) for data in (OLD, b"kept", NEW))
    plan = plan_publication(FLEET, held=[old, kept], recorded={old: len(OLD), kept: 4}, live=[kept, new])
    assert plan.blobs == (new,)
    assert plan.clear == tuple(build_blob_topic(FLEET, old, index) for index in range(4))


def test_blobs_go_first_then_the_offer_then_what_is_cleared(tmp_path: Path, broker: MemoryBroker) -> None:
    publisher = build_publisher(tmp_path, broker)
    asyncio.run(publisher.publish(b"offer 1", by_digest(OLD)))
    broker.published.clear()
    asyncio.run(publisher.publish(b"offer 2", by_digest(NEW)))
    assert [topic for topic, _ in broker.published] == [*topics_of(NEW), OFFER_TOPIC, *topics_of(OLD)]
    assert broker.retained.keys() == {*topics_of(NEW), OFFER_TOPIC}
    assert b"".join(broker.retained[topic] for topic in topics_of(NEW)) == NEW


def test_what_the_broker_holds_is_not_sent_again_until_it_restarts(tmp_path: Path, broker: MemoryBroker) -> None:
    publisher = build_publisher(tmp_path, broker)
    asyncio.run(publisher.publish(b"offer", by_digest(OLD, NEW)))
    held = dict(broker.retained)
    broker.published.clear()
    asyncio.run(publisher.publish(b"offer", by_digest(OLD, NEW)))
    assert broker.published == []
    broker.retained.clear()
    asyncio.run(publisher.republish(b"offer", by_digest(OLD, NEW)))
    assert broker.retained == held


def test_blobs_that_a_killed_coordinator_published_are_cleared_by_the_next(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    class BrokerAwayError(ServerError):
        pass

    async def publish(topic: str, payload: bytes, *, retain: bool, content_type: str) -> None:
        if topic == OFFER_TOPIC:
            raise BrokerAwayError
        await broker.publish(topic, payload, retain=retain, content_type=content_type)

    interrupted = Publisher(fleet=FLEET, record_path=tmp_path / "published.json", publish=publish)
    with pytest.raises(BrokerAwayError):
        asyncio.run(interrupted.publish(b"offer 1", by_digest(OLD)))
    assert set(topics_of(OLD)) <= broker.retained.keys()
    asyncio.run(build_publisher(tmp_path, broker).publish(b"offer 2", by_digest(NEW)))
    assert broker.retained.keys() == {*topics_of(NEW), OFFER_TOPIC}


def test_blob_that_is_not_what_its_digest_says_is_left_out_until_it_is(tmp_path: Path, broker: MemoryBroker) -> None:
    publisher = build_publisher(tmp_path, broker)
    gone = {build_digest(b"gone"): tmp_path / "gone"}
    asyncio.run(publisher.publish(b"offer", {build_digest(OLD): NEW, **by_digest(NEW), **gone}))
    assert broker.retained.keys() == {*topics_of(NEW), OFFER_TOPIC}
    asyncio.run(publisher.publish(b"offer", by_digest(OLD, NEW)))
    assert broker.retained.keys() == {*topics_of(OLD), *topics_of(NEW), OFFER_TOPIC}


def test_nothing_is_cleared_while_not_all_blobs_are_known(tmp_path: Path, broker: MemoryBroker) -> None:
    publisher = build_publisher(tmp_path, broker)
    asyncio.run(publisher.publish(b"offer 1", by_digest(OLD)))
    asyncio.run(publisher.publish(b"offer 2", by_digest(NEW), clears=False))
    assert broker.retained.keys() == {*topics_of(OLD), *topics_of(NEW), OFFER_TOPIC}
    asyncio.run(publisher.publish(b"offer 3", by_digest(NEW)))
    assert broker.retained.keys() == {*topics_of(NEW), OFFER_TOPIC}


def test_bytes_pushed_are_what_a_device_on_the_previous_version_fetches(tmp_path: Path, broker: MemoryBroker) -> None:
    server = ReleaseServer(tmp_path / "server", broker)
    first, second = (server.write_version(number, b"%d" % number + BIG) for number in (1, 2))
    manifests = [(path / "manifest.json").read_bytes() for path in (first, second)]
    everything = sum(path.stat().st_size for path in list_blobs(first).values())
    assert count_pushed_bytes(manifests[0], None) == everything
    assert count_pushed_bytes(manifests[1], parse_manifest(manifests[0])) == len(manifests[1]) + 1 + len(BIG)


def test_device_on_the_base_of_a_delta_fetches_that_and_not_the_weights(tmp_path: Path, broker: MemoryBroker) -> None:
    server = ReleaseServer(tmp_path / "server", broker)
    first = server.write_version(1, b"template", weights=OLD)
    second = server.write_version(2, b"template", weights=NEW, deltas={OLD: b"a delta"})
    third = server.write_version(3, b"template", weights=OLD, deltas={NEW: b"one back"})
    one, two, three = ((path / "manifest.json").read_bytes() for path in (first, second, third))
    assert count_pushed_bytes(two, parse_manifest(one)) == len(two) + len(b"a delta")
    assert count_pushed_bytes(three, parse_manifest(one)) == len(three), "it holds the weights themselves"
    others = (b"template", b"train step clip", b"evaluate clip", NEW)
    assert count_pushed_bytes(two, None) == len(two) + sum(map(len, others))
    assert list_blobs(second).keys() == by_digest(*others, b"a delta", two).keys()
