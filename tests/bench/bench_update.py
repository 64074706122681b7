"""From an offer that was received to its version that serves, and where that time goes; the transfer takes none.

Everything is the agent's own but the broker, which is memory. A rehearsal in the shadow would come on top.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from edge_agent.inference.sandbox import try_in_sandbox
from edge_agent.model_server import ModelServer
from edge_agent.traits import find_traits
from edge_agent.updates.installer import Updater
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.verifier import verify_offer
from models.contract.manifest import MANIFEST_NAME
from tests.bench.versions import build_version, copy_as
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import FLEET, MODEL, ReleaseServer

UPDATES = 11  # the first one fetches everything and is not counted


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        first = build_version("digits").directory
        following = copy_as(build_version("digits_next"), 2, Path(directory, "version-2"))
        device = _Device(Path(directory))
        for number in range(UPDATES):
            device.update((first, following)[number % 2])
        return device.summarize()


class _Device:
    """An updater and a model server, timed."""

    def __init__(self, path: Path) -> None:
        self._taken_s: dict[str, list[float]] = {"total": [], "verify": [], "sandbox": [], "load": []}
        self._broker = MemoryBroker()
        self._fleet = ReleaseServer(path / "server", self._broker)
        server = ModelServer(MODEL)
        settings = UpdaterSettings(
            fleet=FLEET,
            model=MODEL,
            device_id="device-1",
            traits=find_traits(""),
            state_dir=path / "device",
            trains=False,
        )
        settings.state_dir.mkdir()
        verify = partial(verify_offer, root=self._fleet.root, trust_dir=settings.state_dir / "tuf")
        self._updater = Updater(
            settings,
            open_offer=self._time("verify", verify),
            reader=self._broker,
            check_version=self._time("sandbox", lambda directory, _rules: try_in_sandbox(directory)),
            open_rehearsal=_refuse,
            try_version=self._time("load", server.adopt),
            serve_challenger=None,
            on_event=lambda *_event: None,
        )

    def update(self, version_dir: Path) -> None:
        """Offer the version, and return when it serves."""
        manifest = (version_dir / MANIFEST_NAME).read_bytes()
        self._fleet.sign_graphs(version_dir)
        self._fleet.repository.set_release(MODEL, {"champion": manifest}, now=datetime.now(UTC))
        offer = self._fleet.publish(version_dir)
        started_s = time.perf_counter()
        asyncio.run(self._updater.handle_offer(offer))
        self._taken_s["total"].append(time.perf_counter() - started_s)
        current = self._updater.current()
        assert current is not None
        assert (current.directory / MANIFEST_NAME).read_bytes() == manifest

    def summarize(self) -> dict[str, float]:
        """Return medians; what is neither verifying, nor trying, nor loading is the disk, mostly syncs."""
        parts = {name: [1000 * taken for taken in all_s[1:]] for name, all_s in self._taken_s.items()}
        parts["disk"] = [
            total - sum(others) for total, *others in zip(*(parts[name] for name in self._taken_s), strict=True)
        ]
        return {f"update_{name}_ms": statistics.median(values) for name, values in parts.items()}

    def _time(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self._taken_s[name].append(time.perf_counter() - started_s)

        return timed


def _refuse(*_arguments: Any) -> Any:
    raise AssertionError("nothing here is rehearsed")
