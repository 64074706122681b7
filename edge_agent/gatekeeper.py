"""Lets a training process in while this machine's owner can spare the machine, and has it ended once that is over.

It is ended, not stopped: a stopped one keeps its memory, and the round would wait for a node that is silent. What its
round had charged stays charged, since noise may have left the device already.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from edge_agent.config import AgentSettings
from edge_agent.errors import StalledError
from edge_agent.monitor import machine
from edge_agent.owner import build_report, load_entries
from edge_agent.training.admission import NOT_NOW, Conditions, find_refusal
from models.contract.encoding import build_json, parse_json
from models.contract.errors import MalformedError
from models.contract.files import save_atomically

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 2.0  # between two looks while a process trains
LOOK_S = 1.0  # over which the load is taken before one starts
PAUSE_S = 30.0  # after an end, or a machine at its limit would start and end one every few seconds


class Samples(Protocol):
    """What the owner keeps."""

    def count(self, *, after: int = 0) -> int | None: ...
    def find_newest(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """The last run that this device trained in, and the newest sample that it could train on, by its number."""

    schema_version: Literal[1] = 1
    run: str = ""
    newest: int = 0


class Gatekeeper:
    """Belongs to one asyncio loop."""

    def __init__(
        self,
        settings: AgentSettings,
        samples: Samples,
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            settings: What the owner allows.
            samples: What there is to train on.
            root: Folder that holds /sys and /proc.
            clock: Monotonic, s.
        """
        self._settings = settings
        self._allowed = settings.training
        self._samples = samples
        self._root = root
        self._clock = clock
        self._closed_until = clock()
        self._newest: int | None = None
        self._path = settings.state_dir / "trained.json"
        self._last = self._load_last()
        self._saving: asyncio.Task[None] | None = None

    async def find_refusal(self, run: str) -> str | None:
        """Return why no process of `run` may start now; None if one may. At most LOOK_S s, and only where load matters."""
        if self._clock() < self._closed_until:
            return NOT_NOW
        before = machine.read_processor_times(self._root)
        if self._allowed.max_load < 1:
            await asyncio.sleep(LOOK_S)
        return await asyncio.to_thread(self._judge_start, run, before)

    async def wait_for_refusal(self) -> str:
        """Return once training may go on no longer, and why."""
        while True:
            before = machine.read_processor_times(self._root)
            await asyncio.sleep(WATCH_INTERVAL_S)
            if reason := find_refusal(self._allowed, self._measure(before)):
                self._closed_until = self._clock() + PAUSE_S
                return reason

    def note_trained(self, run: str) -> None:
        """Remember that `run` has used what samples there were when its process was let in."""
        if self._newest is not None and self._last.run != run:
            self._last = _Trained(run=run, newest=self._newest)
            self._saving = asyncio.create_task(asyncio.to_thread(self._save, self._last))

    def _judge_start(self, run: str, before: machine.ProcessorTimes | None) -> str | None:
        now = self._measure(before)
        if self._allowed.min_new_samples:
            self._newest = self._samples.find_newest()
            if self._last.run != run:  # a process of the same run that starts again trains on the same
                now = replace(now, new_samples=self._samples.count(after=self._last.newest))
        return find_refusal(self._allowed, now) or self._find_spent(run)

    def _measure(self, before: machine.ProcessorTimes | None) -> Conditions:
        local = time.localtime()
        return Conditions(
            on_mains=machine.is_on_mains(self._root),
            battery=machine.read_battery(self._root),
            temperature_c=machine.read_temperature_c(self._root),
            load=machine.compute_load(before, machine.read_processor_times(self._root)),
            metered=machine.is_metered(self._root, self._allowed.metered_interfaces),
            minute=60 * local.tm_hour + local.tm_min,
        )

    def _find_spent(self, run: str) -> str | None:
        """Return that nothing is left of the budget, unless `run` was paid before: it may go on at no further cost.

        What a round costs is only known once its order is there; the ledger then decides.
        """
        try:
            entries = load_entries(self._settings)
        except StalledError as error:
            return str(error)
        if any(entry.run == run for entry in entries):
            return None
        report = build_report(entries, self._settings.privacy)
        lefts = [each.left for each in report.spent if each.model == self._settings.model]
        return "its privacy budget is spent" if min([report.total_left, *lefts]) <= 0 else None

    def _load_last(self) -> _Trained:
        try:
            return parse_json(self._path.read_bytes(), _Trained)
        except FileNotFoundError:
            return _Trained()
        except (OSError, MalformedError) as error:  # then all samples count as new
            log.warning("%s: %s", self._path, error)
            return _Trained()

    def _save(self, trained: _Trained) -> None:
        try:
            save_atomically(self._path, build_json(trained))
        except OSError as error:
            log.warning("%s: %s", self._path, error.strerror or error)
