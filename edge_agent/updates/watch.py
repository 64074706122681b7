"""A broker can withhold newer offers, but not beyond the expiry of the one it shows: that is told, again and again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

INTERVAL_S = 3600.0  # opening an offer takes 0.3 s of processor time; the shortest lifetime is a day


class OfferWatch:
    """Hands offers on, and the newest one again while no other comes."""

    def __init__(self, handle_offer: Callable[[bytes], Awaitable[None]], *, interval_s: float = INTERVAL_S) -> None:
        """Prepare it; `handle_offer` must do nothing with an offer that it has followed, and tell if it has expired."""
        self._handle_offer, self._interval_s = handle_offer, interval_s
        self._newest: bytes | None = None

    async def take(self, payload: bytes) -> None:
        """Hand on an offer that came."""
        self._newest = payload
        await self._handle_offer(payload)

    async def keep_checking(self) -> None:
        """Run until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            if self._newest is None:
                continue
            try:
                await self._handle_offer(self._newest)
            except Exception:
                logger.exception("the newest offer could not be handled again")
