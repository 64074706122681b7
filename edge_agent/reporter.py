"""What a device says to its fleet: events until they are acknowledged, telemetry until the broker has it, its status now.

    said --> one thread: on disk --> sent, oldest first --> acknowledged --> one thread: off the disk

Nothing here waits for the disk: the loop answers requests meanwhile.
"""

import asyncio
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from edge_agent.config import AgentSettings
from edge_agent.errors import StalledError
from edge_agent.link.mqtt import Link, Publication
from edge_agent.link.outbox import Bounds, Item, Kind, Outbox, open_outbox
from edge_agent.model_server import ModelServer
from edge_agent.monitor.latency import subtract
from edge_agent.monitor.telemetry import build_telemetry, read_rss_mb
from edge_agent.updates.installer import Updater
from models.contract.encoding import build_json
from models.contract.ledger import LedgerHead
from models.contract.messages import Ack, Event, EventKind, Status
from models.contract.topics import Channel, build_device_topic
from models.contract.wave import Traits

log = logging.getLogger(__name__)

RESENT_MAX = 50  # unacknowledged events sent again with each telemetry
UNCONFIRMED_MAX = 50  # sent at once without the broker's word
MESSAGE_MAX_CHARS = 500


class Reporter:
    """Writes to the device's own topics.

    Attributes:
        ignored: Messages received so far that were not what their topic says.
    """

    def __init__(
        self, settings: AgentSettings, traits: Traits, *, link: Link, updater: Updater, server: ModelServer
    ) -> None:
        """Open the outbox; if the disk has none to give, events wait in memory."""
        self.ignored = 0
        self._settings = settings
        self._traits = traits
        self._link = link
        self._updater = updater
        self._server = server
        self._reported = server.latencies.snapshot()
        self._started_s = time.monotonic()
        self._outbox = _open_outbox(settings)
        self._writer = ThreadPoolExecutor(1, "outbox")
        self._new: list[Item] = []
        self._arrived: list[str] = []
        self._is_due = asyncio.Event()
        self._is_status_due = self._is_resend_due = False
        self._connection = 0  # counts connections
        self._sent_position = self._unconfirmed = 0  # of this connection
        self._status_topic, event_topic, telemetry_topic = (
            build_device_topic(settings.fleet, settings.device_id, channel)
            for channel in (Channel.STATUS, Channel.EVENT, Channel.TELEMETRY)
        )
        self._topics = {Kind.EVENT: event_topic, Kind.TELEMETRY: telemetry_topic}

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_s

    def tell(
        self,
        kind: EventKind,
        message: str,
        *,
        version: int | None = None,
        run: str | None = None,
        round_number: int | None = None,
        ledger: LedgerHead | None = None,
    ) -> None:
        """Say that something happened, now or when the broker is back, and how the device is since then."""
        event = Event(
            id=uuid.uuid4().hex,
            sent_at=time.time(),
            kind=kind,
            message=message[:MESSAGE_MAX_CHARS],
            model=self._settings.model,
            version=version,
            run=run,
            round=round_number,
            ledger=ledger,
        )
        log.info("%s: %s", kind, event.message)
        self._new.append(Item(id=event.id, kind=Kind.EVENT, said_s=event.sent_at, payload=build_json(event)))
        self._is_status_due = True
        self._is_due.set()

    def take_ack(self, ack: Ack) -> None:
        self._arrived.extend(ack.ids)
        self._is_due.set()

    def greet(self) -> None:
        """Say on a new connection how the device is, and what it could not say before."""
        self._link.publish(self.build_status(online=True))
        self._connection += 1
        self._sent_position = self._unconfirmed = 0
        self._is_due.set()

    async def keep_sending(self) -> None:
        """Keep what is said, send what is kept, and forget what has arrived, for ever."""
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            await self._save()
            await self._send()

    async def send_telemetry(self) -> None:
        """Report at the configured interval, for ever."""
        while True:
            await asyncio.sleep(self._settings.telemetry.interval_s)
            counts = self._server.latencies.snapshot()
            current = self._updater.current()
            telemetry = build_telemetry(
                model=self._settings.model,
                version=current.manifest.version if current else None,
                now_s=time.time(),
                uptime_s=self.uptime_s,
                rss_mb=read_rss_mb(),
                latencies=subtract(counts, self._reported),
                dropped=self._outbox.dropped,
            )
            self._reported = counts
            self._new.append(
                Item(id=telemetry.id, kind=Kind.TELEMETRY, said_s=telemetry.sent_at, payload=build_json(telemetry))
            )
            self._is_resend_due = True
            self._is_due.set()

    def build_status(self, *, online: bool) -> Publication:
        """Return the device's retained status; with `online` false its will."""
        current = self._updater.current()
        status = Status(
            sent_at=time.time(),
            online=online,
            agent=self._traits.agent,
            model=self._settings.model,
            version=current.manifest.version if current else None,
            digest=current.digest if current else None,
            slot=current.slot if current else None,
            update=self._updater.phase.value,
            trains=self._settings.federation is not None,
            challenger=self._server.find_challenger(),
            traits=self._traits,
        )
        return Publication(topic=self._status_topic, payload=build_json(status), retain=True)

    def count_unsent(self) -> int:
        """Return how many events the coordinator has not acknowledged."""
        return self._outbox.events

    def count_dropped(self) -> int:
        """Return how many messages were lost, either way."""
        return self._link.dropped + self._outbox.dropped

    def close(self) -> None:
        """Keep what was said last."""
        self._writer.shutdown()
        self._outbox.put(self._new, now_s=time.time())
        self._outbox.close()

    async def _save(self) -> None:
        new, self._new = self._new, []
        arrived, self._arrived = self._arrived, []
        write = asyncio.get_running_loop().run_in_executor
        if new and not await write(self._writer, partial(self._outbox.put, new, now_s=time.time())):
            for item in new:  # said once, if it can be said now
                self._publish(item)
        if arrived:
            await write(self._writer, self._outbox.remove, arrived)

    async def _send(self) -> None:
        read = asyncio.get_running_loop().run_in_executor
        while self._link.connected and (room := UNCONFIRMED_MAX - self._unconfirmed) > 0:
            connection, after = self._connection, self._sent_position
            items = await read(self._writer, partial(self._outbox.load, after=after, limit=room))
            if connection != self._connection:  # it all begins anew
                continue
            for item in items:
                if not self._publish(item):
                    return
                self._sent_position = item.position
            if not items:
                break
        if self._is_status_due and self._link.publish(self.build_status(online=True)):
            self._is_status_due = False
        if self._is_resend_due and not self._unconfirmed:
            self._is_resend_due, up_to = False, self._sent_position
            for item in await read(self._writer, partial(self._outbox.load_events, up_to=up_to, limit=RESENT_MAX)):
                self._publish(item)

    def _publish(self, item: Item) -> bool:
        publication = Publication(topic=self._topics[item.kind], payload=item.payload)
        is_sent = self._link.publish(publication, on_answered=partial(self._note_answer, item))
        self._unconfirmed += is_sent
        return is_sent

    def _note_answer(self, item: Item, has_arrived: bool) -> None:  # noqa: FBT001 - a callback
        self._unconfirmed -= 1
        if has_arrived and item.kind is Kind.TELEMETRY:  # an event is the coordinator's to acknowledge
            self._arrived.append(item.id)
        self._is_due.set()


def _open_outbox(settings: AgentSettings) -> Outbox:
    telemetry = settings.telemetry
    bounds = Bounds(max_bytes=telemetry.kept_mb * 1_000_000, telemetry_max_age_s=telemetry.kept_days * 86_400)
    try:
        return open_outbox(settings.state_dir / "outbox.db", bounds)
    except StalledError as error:  # a model must not stop answering for want of a diary
        log.error("events wait in memory only: %s", error)  # noqa: TRY400 - the message says it all
        return open_outbox(Path(":memory:"), bounds)
