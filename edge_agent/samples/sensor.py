"""Samples that a sensor publishes: taken without blocking, kept in batches, counted where they are lost."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from edge_agent.errors import AgentError
from edge_agent.samples.ingest import RawSample

QUEUED_MAX = 1000  # messages that wait for the disk; a second of a fast sensor
BATCH_MAX = 100  # messages in one transaction


class SensorFeed:
    """Samples on their way from the broker to the disk; its methods belong to one event loop.

    Attributes:
        ignored: Messages lost so far: malformed, more than the disk could take, or with no room for them.
    """

    def __init__(
        self,
        *,
        parse: Callable[[bytes], Sequence[Any]],
        keep: Callable[[Sequence[Any]], object],
        keep_share: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Prepare.

        Args:
            parse: Returns the samples of a message, or raises AgentError.
            keep: Makes them durable, or raises AgentError; may block, so it is called in a thread.
            keep_share: Share of the samples that is kept.
            draw: Gives values in [0, 1).
        """
        self.ignored = 0
        self._parse = parse
        self._keep = keep
        self._keep_share = keep_share
        self._draw = draw
        self._queue: asyncio.Queue[Sequence[RawSample]] = asyncio.Queue(QUEUED_MAX)

    def take(self, payload: bytes) -> None:
        """Take one message; what is wrong with it is counted, not raised."""
        try:
            self._queue.put_nowait(self._parse(payload))
        except (AgentError, asyncio.QueueFull):
            self.ignored += 1

    async def run(self) -> None:
        """Keep what was taken, for ever."""
        while True:
            messages = [await self._queue.get()]
            while len(messages) < BATCH_MAX and not self._queue.empty():
                messages.append(self._queue.get_nowait())
            chosen = [[sample for sample in message if self._draw() < self._keep_share] for message in messages]
            if kept := [message for message in chosen if message]:
                await self._keep_all(kept)

    async def _keep_all(self, messages: Sequence[Sequence[RawSample]]) -> None:
        """Keep all messages at once or, if one of them cannot be kept, each alone."""
        try:
            await asyncio.to_thread(self._keep, [sample for message in messages for sample in message])
        except AgentError:
            if len(messages) == 1:
                self.ignored += 1
                return
            for message in messages:
                await self._keep_all([message])
