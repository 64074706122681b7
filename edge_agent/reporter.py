"""What a device says to its fleet: events until they are acknowledged, its status, its telemetry."""

import asyncio
import logging
import time
import uuid
from pathlib import Path

from edge_agent.config import AgentSettings
from edge_agent.errors import StalledError
from edge_agent.link.mqtt import Link, Publication
from edge_agent.link.outbox import Outbox, open_outbox
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
        self._unreported = 0
        self._started_s = time.monotonic()
        self._outbox = _open_outbox(settings.state_dir / "outbox.db")
        self._event_topic, self._status_topic, self._telemetry_topic = (
            build_device_topic(settings.fleet, settings.device_id, channel)
            for channel in (Channel.EVENT, Channel.STATUS, Channel.TELEMETRY)
        )

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
        payload = build_json(event)
        self._outbox.put(event.id, payload)
        self._link.publish(Publication(topic=self._event_topic, payload=payload))
        self._link.publish(self.build_status(online=True))

    def take_ack(self, ack: Ack) -> None:
        self._outbox.remove(ack.ids)

    def greet(self) -> None:
        """Say on a new connection how the device is, and what it could not say before."""
        self._link.publish(self.build_status(online=True))
        self._resend()

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
            )
            if self._link.publish(Publication(topic=self._telemetry_topic, payload=build_json(telemetry))):
                self._reported = counts
            else:
                self._unreported += 1
            self._resend(RESENT_MAX)

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
        return self._outbox.count()

    def count_dropped(self) -> int:
        """Return how many messages were lost since the start, either way."""
        return self._link.dropped + self._outbox.dropped + self._unreported

    def close(self) -> None:
        self._outbox.close()

    def _resend(self, limit: int = -1) -> None:
        for payload in self._outbox.load_pending(limit):
            self._link.publish(Publication(topic=self._event_topic, payload=payload))


def _open_outbox(path: Path) -> Outbox:
    try:
        return open_outbox(path)
    except StalledError as error:  # a model must not stop answering for want of a diary
        log.error("events wait in memory only: %s", error)  # noqa: TRY400 - the message says it all
        return open_outbox(Path(":memory:"))
