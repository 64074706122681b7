"""A broker's retained messages, in memory: what both ends of the release path see of MQTT."""

import asyncio
from dataclasses import dataclass, field


@dataclass
class MemoryBroker:
    """Keeps what is published as retained and gives it to readers.

    Attributes:
        retained: Payloads by topic.
        published: Every publication in order, topic and payload.
        reads: Topics that were read, in order.
        stalled: Readers of these topics wait until `release` is called.
    """

    retained: dict[str, bytes] = field(default_factory=dict)
    published: list[tuple[str, bytes]] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    stalled: set[str] = field(default_factory=set)
    concurrent_max: int = 0

    def __post_init__(self) -> None:
        self._concurrent = 0
        self._released = asyncio.Event()
        self._stalling = asyncio.Event()

    async def publish(self, topic: str, payload: bytes, *, retain: bool, content_type: str) -> None:
        self.published.append((topic, payload))
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)

    async def read(self, topic: str, timeout_s: float) -> bytes | None:
        self.reads.append(topic)
        self._concurrent += 1
        self.concurrent_max = max(self.concurrent_max, self._concurrent)
        try:
            await asyncio.sleep(0)
            if topic in self.stalled:
                self._stalling.set()
                await self._released.wait()
            return self.retained.get(topic)
        finally:
            self._concurrent -= 1

    async def wait_until_stalled(self) -> None:
        async with asyncio.timeout(10):
            await self._stalling.wait()

    def release(self) -> None:
        self._released.set()

    def get_chunks(self, digest: str) -> list[str]:
        """Return the topics of the chunks of a blob, by index."""
        topics = [topic for topic in self.retained if f"/blob/{digest}/" in topic]
        return sorted(topics, key=lambda topic: int(topic.rsplit("/", 1)[1]))
