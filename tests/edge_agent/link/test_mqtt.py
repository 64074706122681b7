"""The link against a real broker that is killed, silent, hostile or away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import edge_agent.link.mqtt as mqtt_module
from edge_agent.link.mqtt import Broker, Link, Publication
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.observer import Observer
from tests.simulators.waiting import wait_until


class Receiver:
    def __init__(self, port: int, keepalive_s: int = 5) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.connections = 0
        self.link = Link(
            Broker(
                host="127.0.0.1",
                port=port,
                client_id="device",
                keepalive_s=keepalive_s,
                subscriptions=("in", "in/more"),
            ),
            build_will=lambda: Publication(topic="will", payload=b"gone", retain=True),
            on_message=self.take,
            on_connected=self.count,
        )

    def take(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))
        if payload == b"raise":
            raise RuntimeError("a handler failed")

    def count(self) -> None:
        self.connections += 1


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.wait_for(asyncio.to_thread(wait_until, condition, what), 30)


@asynccontextmanager
async def connected(port: int, *, keepalive_s: int = 5) -> AsyncIterator[Receiver]:
    receiver = Receiver(port, keepalive_s)
    running = asyncio.create_task(receiver.link.run())
    try:
        await until(lambda: receiver.link.connected, "the link to connect")
        yield receiver
    finally:
        running.cancel()
        await asyncio.wait({running})


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path) as mosquitto:
        yield mosquitto


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as seen:
        yield seen


def test_messages_go_both_ways(broker: Mosquitto, observer: Observer) -> None:
    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            # Retained: connected comes before the broker has taken the subscriptions.
            observer.publish("in", b"hello", retain=True)
            observer.publish("in/more", b"there", retain=True)
            observer.publish("elsewhere", b"not ours", retain=True)
            await until(lambda: len(receiver.messages) == 2, "both messages")
            assert receiver.link.publish(Publication(topic="out", payload=b"{}", retain=True))
            await until(lambda: observer.seen("out"), "our message")

    asyncio.run(scenario())


def test_handler_that_raises_does_not_end_the_link(
    broker: Mosquitto, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            observer.publish("in", b"raise")
            observer.publish("in", b"after")
            await until(lambda: ("in", b"after") in receiver.messages, "the message after the failure")

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert "could not be handled" in caplog.text


def test_retained_messages_are_read_together_and_silence_is_none(broker: Mosquitto, observer: Observer) -> None:
    topics = [f"blob/{index}" for index in range(40)]
    for topic in topics:
        observer.publish(topic, topic.encode() * 1000, retain=True)

    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            read = receiver.link.read
            found = await asyncio.gather(*(read(topic, 10) for topic in topics))
            assert found == [topic.encode() * 1000 for topic in topics]
            twice = await asyncio.gather(read(topics[0], 10), read(topics[0], 10))
            assert twice == [found[0]] * 2
            assert await read(topics[0], 10) == found[0]
            assert await read("blob/none", 0.3) is None
            assert not receiver.link._reads
            assert receiver.messages == []

    asyncio.run(scenario())


def test_message_beyond_the_size_limit_is_withheld_and_the_link_lives(broker: Mosquitto, observer: Observer) -> None:
    observer.publish("bomb", b"x" * (mqtt_module._PACKET_MAX_BYTES + 1), retain=True)

    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            assert await receiver.link.read("bomb", 0.5) is None
            observer.publish("in", b"still here")
            await until(lambda: receiver.messages, "the link to live")

    asyncio.run(scenario())


def test_link_and_its_reads_come_back_after_the_broker_was_killed(broker: Mosquitto) -> None:
    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            broker.kill()
            await until(lambda: not receiver.link.connected, "the loss to be noticed")
            assert not receiver.link.publish(Publication(topic="out", payload=b"{}"))
            reading = asyncio.create_task(receiver.link.read("late", 30))
            await asyncio.to_thread(broker.start)
            await until(lambda: receiver.connections == 2, "the second connection")
            with Observer(broker.port) as observer:
                observer.publish("late", b"here", retain=True)
                assert await reading == b"here"
                observer.publish("in", b"again")
                await until(lambda: ("in", b"again") in receiver.messages, "the subscription to be there again")

    asyncio.run(scenario())


def test_session_keeps_what_was_sent_while_the_device_was_away(broker: Mosquitto, observer: Observer) -> None:
    async def scenario() -> None:
        async with connected(broker.port):
            pass
        await until(lambda: observer.seen("will"), "the will of a device that stopped")
        observer.publish("in", b"while away")
        async with connected(broker.port) as receiver:
            await until(lambda: ("in", b"while away") in receiver.messages, "what was sent meanwhile")

    asyncio.run(scenario())


def test_thread_of_paho_that_dies_is_replaced(broker: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            monkeypatch.setattr(receiver.link._client, "_loop", lambda _timeout: 1 / 0)
            await until(lambda: receiver.connections == 2, "a new connection")

    asyncio.run(scenario())


def test_connection_that_is_half_open_is_given_up_and_made_anew(broker: Mosquitto) -> None:
    async def scenario() -> None:
        async with connected(broker.port, keepalive_s=1) as receiver:
            with broker.stopped():  # its side of the connection stays open, and says nothing
                await until(lambda: not receiver.link.connected, "the silence to be noticed")
            await until(lambda: receiver.connections == 2, "a new connection")

    asyncio.run(scenario())


def test_publisher_hears_that_the_broker_has_its_message_and_nothing_of_a_lost_connection(broker: Mosquitto) -> None:
    answers: list[tuple[str, bool]] = []

    def publish(receiver: Receiver, name: str) -> bool:
        publication = Publication(topic="out", payload=name.encode())
        return receiver.link.publish(publication, on_answered=lambda is_taken: answers.append((name, is_taken)))

    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            assert publish(receiver, "first")
            await until(lambda: answers, "the broker's answer")
            with broker.stopped():
                assert publish(receiver, "lost")
                broker.kill()
            await until(lambda: not receiver.link.connected, "the loss to be noticed")
            assert not publish(receiver, "refused")
            await asyncio.to_thread(broker.start)
            await until(lambda: receiver.link.connected, "the second connection")
            assert publish(receiver, "second")
            await until(lambda: len(answers) == 2, "the second answer")

    asyncio.run(scenario())
    assert answers == [("first", True), ("second", True)]


def test_broker_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)

    async def scenario() -> None:
        receiver = Receiver(broker.port)
        running = asyncio.create_task(receiver.link.run())
        assert await receiver.link.read("x", 0.05) is None
        await asyncio.to_thread(broker.start)
        await until(lambda: receiver.link.connected, "the link to connect")
        running.cancel()
        await asyncio.wait({running})

    try:
        asyncio.run(scenario())
    finally:
        broker.kill()


def test_flood_is_held_back_at_the_broker_and_nothing_is_lost(broker: Mosquitto, observer: Observer) -> None:
    async def scenario() -> None:
        async with connected(broker.port) as receiver:
            for number in range(300):  # while the loop is busy here it takes none of them
                observer.publish("in", b"%d" % number)
            await until(lambda: len(receiver.messages) == 300, "all of the flood")
            assert receiver.link.dropped == 0

    asyncio.run(scenario())
