"""What the coordinator says to the fleet about a run: the retained notice, and who is woken."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from fl_server.config import RoundsSettings
from fl_server.errors import ServerError
from fl_server.fleet.mqtt import Link, LinkError
from fl_server.fleet.roster import Roster
from fl_server.orders import Orders
from fl_server.rounds.quorum import choose_poll_interval_s
from fl_server.rounds.run import RunSpec
from models.contract.floors import Floors
from models.contract.topics import Channel, build_device_topic, build_run_topic

logger = logging.getLogger(__name__)


class Announcer:
    """Signs and publishes; what an absent broker did not take is said again by `repeat`."""

    def __init__(
        self,
        link: Link,
        orders: Orders,
        roster: Roster,
        rounds: RoundsSettings,
        *,
        load_floors: Callable[[], Floors],
    ) -> None:
        self._link, self._orders, self._roster, self._rounds = link, orders, roster, rounds
        self._load_floors = load_floors
        self._notices: dict[str, bytes] = {}  # by topic, as they must be retained

    async def announce(self, spec: RunSpec, *, is_open: bool) -> None:
        """Tell all devices that the run is open, or over."""
        topic = build_run_topic(spec.fleet, spec.model)
        self._notices[topic] = self._orders.build_notice(spec, is_open=is_open)
        await self._publish(topic, self._notices[topic], retain=True)

    async def wake(self, spec: RunSpec, device_ids: Iterable[str]) -> None:
        """Let those of the run's devices that are online start their training process."""
        online = {device.device_id for device in self._roster.list_devices() if device.may_train}
        poll_interval_s = choose_poll_interval_s(devices=len(spec.devices), budget_per_s=self._rounds.poll_budget_per_s)
        floors = await asyncio.to_thread(self._find_floors)
        for device_id in sorted(online.intersection(device_ids)):
            command = self._orders.build_wake(
                spec,
                device_id,
                poll_interval_s=poll_interval_s,
                idle_timeout_s=self._rounds.idle_timeout_s,
                ledger=self._roster.get_ledger(device_id),
                floors=floors,
            )
            await self._publish(build_device_topic(spec.fleet, device_id, Channel.COMMAND), command)

    async def repeat(self) -> None:
        """Publish the notices again: the broker may have lost them."""
        for topic, notice in self._notices.items():
            await self._publish(topic, notice, retain=True)

    def _find_floors(self) -> Floors | None:
        try:
            return self._load_floors()
        except (ServerError, OSError) as error:  # a run goes on without
            logger.error("devices are told no floors: %s", error)  # noqa: TRY400
            return None

    async def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        try:
            await self._link.publish(topic, payload, retain=retain)
        except LinkError as error:
            logger.warning("%s: %s; it is said again after the next connection", topic, error)
