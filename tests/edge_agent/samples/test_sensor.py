"""What a sensor publishes is kept in batches; what is lost is counted, and nothing blocks."""

import asyncio
import threading
from collections.abc import Sequence

from edge_agent.errors import RequestError
from edge_agent.samples.sensor import QUEUED_MAX, SensorFeed


def parse(payload: bytes) -> list[tuple[bytes, int]]:
    if payload == b"junk":
        raise RequestError("junk")
    return [(payload, 0)]


class Shelf:
    def __init__(self, *refused: bytes) -> None:
        self.calls: list[list[bytes]] = []
        self.refused = refused
        self.kept = threading.Event()

    def keep(self, samples: Sequence[tuple[bytes, int]]) -> None:
        if any(x in self.refused for x, _ in samples):
            raise RequestError("no")
        self.calls.append([x for x, _ in samples])
        if samples[-1][0] == b"last":
            self.kept.set()


def run(shelf: Shelf, payloads: Sequence[bytes], *, keep_share: float = 1, draws: Sequence[float] = ()) -> SensorFeed:
    left = iter(draws)
    feed = SensorFeed(parse=parse, keep=shelf.keep, keep_share=keep_share, draw=lambda: next(left, 0.0))

    async def go() -> None:
        for payload in payloads:
            feed.take(payload)
        running = asyncio.create_task(feed.run())
        await asyncio.wait_for(asyncio.to_thread(shelf.kept.wait), 20)
        running.cancel()

    asyncio.run(go())
    return feed


def test_messages_that_came_together_are_one_transaction() -> None:
    shelf = Shelf()
    assert run(shelf, [b"a", b"b", b"last"]).ignored == 0
    assert shelf.calls == [[b"a", b"b", b"last"]]


def test_malformed_message_is_counted_and_others_are_kept() -> None:
    shelf = Shelf()
    assert run(shelf, [b"a", b"junk", b"last"]).ignored == 1
    assert shelf.calls == [[b"a", b"last"]]


def test_message_that_cannot_be_kept_does_not_take_others_with_it() -> None:
    shelf = Shelf(b"b")
    assert run(shelf, [b"a", b"b", b"last"]).ignored == 1
    assert shelf.calls == [[b"a"], [b"last"]]


def test_messages_beyond_the_queue_are_counted() -> None:
    shelf = Shelf()
    feed = run(shelf, [*[b"a"] * (QUEUED_MAX - 1), b"last", b"too late", b"too late"])
    assert feed.ignored == 2
    assert sum(map(len, shelf.calls)) == QUEUED_MAX


def test_share_decides_what_is_kept() -> None:
    shelf = Shelf()
    assert run(shelf, [b"a", b"b", b"last"], keep_share=0.5, draws=[0.7, 0.2, 0.4]).ignored == 0
    assert shelf.calls == [[b"b", b"last"]]
