"""Whether a staged version proves itself, and the way back when it does not."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from edge_agent.errors import StalledError
from edge_agent.updates.slots import Version
from models.contract.manifest import ModelManifest

TryVersion: TypeAlias = Callable[[Path, ModelManifest], None]


class Probation:
    """Tries versions on a worker thread, each within a deadline."""

    def __init__(self, *, try_version: TryVersion, get_active: Callable[[], Version | None], timeout_s: float) -> None:
        self._try_version, self._get_active, self._timeout_s = try_version, get_active, timeout_s
        self._hanging: asyncio.Task[None] | None = None

    @property
    def is_hanging(self) -> bool:
        """Whether a version that was given up still runs: a thread cannot be ended."""
        return self._hanging is not None and not self._hanging.done()

    async def prove(self, version: Version) -> None:
        """Return once `version` is what answers; raises whatever makes it unhealthy."""
        trial = asyncio.create_task(asyncio.to_thread(self._try_version, version.directory, version.manifest))
        done, _ = await asyncio.wait({trial}, timeout=self._timeout_s)
        if not done:
            self._hanging = asyncio.create_task(self._await_the_end(trial))
            raise StalledError(f"not healthy within {self._timeout_s:.0f} s")
        trial.result()

    async def change_back(self) -> None:
        """Answer with the active version again."""
        if (active := self._get_active()) is not None:
            await asyncio.to_thread(self._try_version, active.directory, active.manifest)

    async def _await_the_end(self, trial: asyncio.Task[None]) -> None:
        await asyncio.wait({trial})
        if trial.exception() is None:  # it answers after all, but it was too slow
            await self.change_back()
