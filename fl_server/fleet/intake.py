"""What the fleet says, put onto the roster by one thread, a batch in one transaction.

    messages --> thread: one transaction --commit--> Kept, in their order --> acknowledged and acted on

A thousand devices say a thousand things a second: a commit each would keep the disk busy and the loop waiting.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fl_server.fleet.mqtt import FromDevice
from fl_server.fleet.roster import Roster, RosterError
from models.contract.messages import Event, Status, Telemetry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A status or an event that is on disk.

    Attributes:
        before: Of a status, what the device had said last; None if nothing.
        is_new: Of an event, whether it was not here already, as a repeated delivery is.
    """

    device_id: str
    document: Status | Event
    before: Status | None = None
    is_new: bool = False


class Intake:
    """Writes to the roster at `path`; a context that ends its thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "intake")
        self._roster: Roster | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.submit(self._close)
        self._thread.shutdown()

    async def keep(self, messages: Sequence[FromDevice]) -> list[Kept]:
        """Return what of `messages` may be acted on, once all of it is durable; of each device its last telemetry is kept.

        Raises:
            sqlite3.Error: Nothing of it was kept.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._keep, messages)

    def _keep(self, messages: Sequence[FromDevice]) -> list[Kept]:
        if self._roster is None:  # SQLite's connections belong to the thread that opened them
            self._roster = Roster(self._path)
        roster, members = self._roster, dict[str, bool]()
        kept, telemetry = list[Kept](), dict[str, Telemetry]()
        with roster.batch():
            for message in messages:
                device_id = message.device_id
                if device_id not in members:
                    members[device_id] = roster.is_member(device_id)
                    if not members[device_id]:
                        logger.warning("ignored a message of %s, which is not enrolled here", device_id)
                if not members[device_id]:
                    continue
                match message.document:
                    case Telemetry() as document:
                        telemetry[device_id] = document
                    case Status() as document:
                        before = roster.save_status(device_id, document)
                        kept.append(Kept(device_id=device_id, document=document, before=before))
                    case Event() as document:
                        _keep_ledger(roster, device_id, document)
                        is_new = roster.save_event(device_id, document)
                        kept.append(Kept(device_id=device_id, document=document, is_new=is_new))
            for device_id, document in telemetry.items():
                roster.save_telemetry(device_id, document)
        return kept

    def _close(self) -> None:
        if self._roster is not None:
            self._roster.close()


def _keep_ledger(roster: Roster, device_id: str, event: Event) -> None:
    if event.ledger is None or event.run is None:
        return
    try:
        roster.save_ledger(device_id, event.ledger, run=event.run, round_number=event.round or 0)
    except RosterError as error:  # the event itself is kept: told again it would be no better
        logger.warning("%s", error)
