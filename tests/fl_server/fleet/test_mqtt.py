import asyncio

import paho.mqtt.client
import paho.mqtt.publish
import paho.mqtt.subscribe
import pytest

import fl_server.fleet.mqtt as module
from fl_server.fleet.mqtt import Connected, Disconnected, FromDevice, Link, LinkError
from models.contract.encoding import build_json
from models.contract.messages import MESSAGE_MAX_BYTES, Event, EventKind, Status, Telemetry
from tests.simulators.mosquitto import Mosquitto

DEVICE = "fl/v1/demo/device/device-1"
STATUS = Status(sent_at=1.0, online=True, agent="0.1", model="digits")
JUNK = [
    (f"{DEVICE}/status", b""),
    (f"{DEVICE}/status", b"{"),
    (f"{DEVICE}/status", b"\xff\xfe"),
    (f"{DEVICE}/status", b"[" * 10_000),
    (f"{DEVICE}/status", b'{"sent_at": "now"}'),
    (f"{DEVICE}/status", b"1e999"),
    (f"{DEVICE}/status", bytes(MESSAGE_MAX_BYTES + 1)),
    (f"{DEVICE}/telemetry", build_json(STATUS)),
    (f"{DEVICE}/event", b"null"),
    ("fl/v1/demo/device/-bad-/event", build_json(STATUS)),
    ("fl/v1/demo/device/" + "x" * 100 + "/status", build_json(STATUS)),
]


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


def publish(broker: Mosquitto, topic: str, payload: bytes, *, retain: bool = False) -> None:
    paho.mqtt.publish.single(topic, payload, qos=1, retain=retain, port=broker.port, protocol=paho.mqtt.client.MQTTv5)


async def receive(link: Link, kind: type) -> object:
    """Return what came, which must be one item of `kind`."""
    async with asyncio.timeout(20):
        [item] = await link.receive()
    assert isinstance(item, kind), item
    return item


async def publish_when_possible(link: Link, topic: str, payload: bytes) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await link.publish(topic, payload, retain=True)
            except LinkError:
                await asyncio.sleep(0.05)
            else:
                return


def test_messages_of_devices_come_out_typed_and_in_order(broker):
    event = Event(id="a", sent_at=1.0, kind=EventKind.UPDATED, message="version 2")

    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            await asyncio.to_thread(publish, broker, f"{DEVICE}/status", build_json(STATUS))
            await asyncio.to_thread(publish, broker, f"{DEVICE}/event", build_json(event))
            items = []
            async with asyncio.timeout(20):
                while len(items) < 2:
                    items += await link.receive()
            return items

    assert asyncio.run(scenario()) == [
        FromDevice(device_id="device-1", document=STATUS),
        FromDevice(device_id="device-1", document=event),
    ]


def test_junk_on_every_topic_is_counted_and_the_next_good_message_arrives(broker):
    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            for topic, payload in JUNK:
                await asyncio.to_thread(publish, broker, topic, payload)
            await asyncio.to_thread(publish, broker, f"{DEVICE}/status", build_json(STATUS))
            message = await receive(link, FromDevice)
            return message, link.ignored

    message, ignored = asyncio.run(scenario())
    assert message.document == STATUS
    assert ignored == len(JUNK)


def test_telemetry_waits_for_company_and_an_event_does_not(broker, monkeypatch):
    monkeypatch.setattr(module, "TELEMETRY_WAIT_S", 3600.0)
    telemetry = Telemetry(id="a", sent_at=1.0, uptime_s=1.0, rss_mb=60.0, model="digits")

    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            for channel, document in (("telemetry", telemetry), ("telemetry", telemetry), ("status", STATUS)):
                await asyncio.to_thread(publish, broker, f"{DEVICE}/{channel}", build_json(document))
            async with asyncio.timeout(20):
                return await link.receive()

    assert [item.document for item in asyncio.run(scenario())] == [telemetry, telemetry, STATUS]


def test_thread_of_paho_that_dies_is_replaced(broker, monkeypatch):
    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            loop = link._client._loop
            monkeypatch.setattr(link._client, "_loop", lambda _timeout: monkeypatch.undo() or 1 / 0)
            await receive(link, Disconnected)
            await receive(link, Connected)
            assert link._client._loop == loop
            await publish_when_possible(link, "fl/v1/demo/offer", b"again")

    asyncio.run(scenario())


def test_publish_returns_once_the_broker_has_the_message(broker):
    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            await asyncio.gather(*(link.publish(f"fl/v1/demo/blob/{n}", b"x", retain=True) for n in range(100)))

    asyncio.run(scenario())
    found = paho.mqtt.subscribe.simple("fl/v1/demo/blob/+", msg_count=100, port=broker.port)
    assert {message.topic for message in found} == {f"fl/v1/demo/blob/{number}" for number in range(100)}


def test_publish_without_a_broker_says_so(broker):
    broker.kill()

    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await link.publish("fl/v1/demo/offer", b"x")

    with pytest.raises(LinkError, match="is away"):
        asyncio.run(scenario())


def test_broker_killed_and_restarted_is_reported_and_used_again(broker):
    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            broker.kill()
            await receive(link, Disconnected)
            broker.start()
            await receive(link, Connected)
            await publish_when_possible(link, "fl/v1/demo/offer", b"again")
            await asyncio.to_thread(publish, broker, f"{DEVICE}/status", build_json(STATUS))
            await receive(link, FromDevice)

    asyncio.run(scenario())
    assert paho.mqtt.subscribe.simple("fl/v1/demo/offer", port=broker.port).payload == b"again"


def test_publish_under_way_when_the_broker_dies_fails_instead_of_waiting(broker):
    async def scenario():
        async with Link(host="127.0.0.1", port=broker.port, fleet="demo") as link:
            await receive(link, Connected)
            publishing = [
                asyncio.create_task(link.publish("fl/v1/demo/offer", bytes(100_000), retain=True)) for _ in range(50)
            ]
            await asyncio.sleep(0)
            broker.kill()
            async with asyncio.timeout(5):
                return await asyncio.gather(*publishing, return_exceptions=True)

    failures = [result for result in asyncio.run(scenario()) if result is not None]
    assert failures
    assert all(isinstance(failure, LinkError) for failure in failures)
