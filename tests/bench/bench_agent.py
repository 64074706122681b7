"""The whole agent, with broker and store: its memory at rest, its start, and its latency while versions change.

A version changes as it does in a fleet: signed, published to a real mosquitto, verified, fetched, tried in a process
of its own, and activated. All of that shares the cores with the load.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx

from fl_server.directory import Directory
from fl_server.fleet.mqtt import Connected, FromDevice, Link
from fl_server.rollout.publisher import Publisher, list_blobs
from fl_server.rollout.repository import ReleaseRepository
from models.contract.encoding import build_digest
from models.contract.manifest import MANIFEST_NAME
from models.contract.messages import Status
from models.contract.offer import build_offer
from tests.bench.load import finish, measure, running
from tests.bench.peers import prepare_peers, running_peer
from tests.bench.servers import Server, build_json_request, running_agent, running_server
from tests.bench.versions import BenchVersion, build_version, copy_as, load_litert_version
from tests.simulators.agent import find_free_port
from tests.simulators.mosquitto import Mosquitto

FLEET, DEVICE = "bench", "device-1"
STARTS = 3
SWAPS = 100
SWAP_TIMEOUT_S = 60.0
CONNECTIONS = 8
SECONDS = 2.0
REST_S = 0.5
REST_MB = 0.2  # two readings that differ by less are at rest


def run() -> dict[str, float]:
    version = build_version("digits")
    with tempfile.TemporaryDirectory() as directory, Mosquitto(Path(directory)) as broker:
        Path(directory, "server").mkdir()
        Path(directory, "device").mkdir()
        following = copy_as(build_version("digits_next"), 2, Path(directory, "version-2"))
        figures = asyncio.run(measure_agent(Path(directory), broker.port, version, following))
        figures |= asyncio.run(measure_litert(Path(directory, "litert"), broker.port, load_litert_version()))
    return figures | measure_alone(version) | measure_peers(version)


async def measure_agent(directory: Path, broker_port: int, version: BenchVersion, following: Path) -> dict[str, float]:
    """Return memory, start and swaps of `edge-agent run`."""
    request = build_json_request(version)
    async with _coordinating(directory / "server", broker_port, version.manifest.model) as fleet:
        device_dir = directory / "device"
        with fleet.running_device(device_dir) as agent:
            await fleet.release(version.directory, 1)
        starts_s = []
        for _ in range(STARTS):
            with fleet.running_device(device_dir) as agent:
                starts_s.append(agent.start_s)
        with fleet.running_device(device_dir) as agent:
            await fleet.wait_for(1)
            _keep_sample(agent, version)
            measure(agent.tcp, request, connections=1, seconds=0.5)
            figures = {"agent_start_to_ready_s": statistics.median(starts_s), "agent_at_rest_mb": _rest(agent)}
            figures |= await measure_swaps(fleet, agent, request, (version.directory, following))
            figures["agent_at_rest_after_swaps_mb"] = _rest(agent)
    return figures


async def measure_litert(directory: Path, broker_port: int, version: BenchVersion) -> dict[str, float]:
    """Return memory of `edge-agent run` with a TFLite version."""
    device_dir, number = directory / "device", version.manifest.version
    device_dir.mkdir(parents=True)
    async with _coordinating(directory, broker_port, version.manifest.model) as fleet:
        with fleet.running_device(device_dir):
            await fleet.release(version.directory, number)
        with fleet.running_device(device_dir) as agent:
            await fleet.wait_for(number)
            _keep_sample(agent, version)
            measure(agent.tcp, build_json_request(version), connections=1, seconds=0.5)
            return {"agent_litert_at_rest_mb": _rest(agent)}


async def measure_swaps(
    fleet: "_Fleet", agent: Server, request: bytes, versions: tuple[Path, Path]
) -> dict[str, float]:
    """Compare latencies while versions change, one after the other, with those before and after."""
    before = measure(agent.tcp, request, connections=CONNECTIONS, seconds=2 * SECONDS)
    with running(agent.tcp, request, connections=CONNECTIONS, seconds=SWAPS * SWAP_TIMEOUT_S) as process:
        started_s = time.perf_counter()
        for number in range(SWAPS):
            following = (number + 1) % 2
            await fleet.release(versions[following], following + 1)
        swap_s = (time.perf_counter() - started_s) / SWAPS
        during = finish(process, now=True)
    after = measure(agent.tcp, request, connections=CONNECTIONS, seconds=2 * SECONDS)
    assert before.failures == after.failures == 0, "requests fail even while nothing changes"
    steady_us = statistics.fmean((before.p99_us, after.p99_us))
    return {
        "swaps": SWAPS,
        "swap_s": swap_s,
        "swaps_requests": during.requests,
        "swaps_failed_requests": during.failures,
        "swaps_p50_us": during.p50_us,
        "swaps_p99_us": during.p99_us,
        "steady_p99_us": steady_us,
        "swaps_p99_to_steady_ratio": during.p99_us / steady_us,
    }


def measure_alone(version: BenchVersion) -> dict[str, float]:
    """Return memory and start of `edge-agent serve`."""
    starts_s, resident_mb = [], []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as directory, running_agent(version.directory, Path(directory)) as server:
            starts_s.append(server.start_s)
            measure(server.tcp, build_json_request(version), connections=1, seconds=0.5)
            resident_mb.append(_rest(server))
    return {
        "serve_start_to_ready_s": statistics.median(starts_s),
        "serve_at_rest_mb": statistics.median(resident_mb),
    }


def measure_peers(version: BenchVersion) -> dict[str, float]:
    """Return the same of every peer there is; of MLServer with its workers."""
    figures: dict[str, float] = {}
    for name, peer in prepare_peers().items():
        with tempfile.TemporaryDirectory() as directory, running_peer(peer, version, Path(directory)) as server:
            measure(server.tcp, build_json_request(version), connections=1, seconds=0.5)
            figures |= {f"{name}_start_to_ready_s": server.start_s, f"{name}_at_rest_mb": _rest(server)}
    return figures


class _Fleet:
    """A coordinator's release path, and the one device that follows it."""

    def __init__(self, path: Path, link: Link, broker_port: int, model: str) -> None:
        self._link, self._broker_port, self._model = link, broker_port, model
        self._repository = ReleaseRepository.create(Directory(path), now=datetime.now(UTC))
        self._publisher = Publisher(fleet=FLEET, record_path=path / "published.json", publish=link.publish)

    async def release(self, version_dir: Path, number: int) -> None:
        """Make a version what the device should run, and wait until it does."""
        manifest = (version_dir / MANIFEST_NAME).read_bytes()
        self._repository.set_release(self._model, {"champion": manifest}, now=datetime.now(UTC))
        pem = self._repository.build_coordinator_pem()
        blobs: dict[str, Path | bytes] = {build_digest(pem): pem, **list_blobs(version_dir)}
        await self._publisher.publish(build_offer(self._repository.load_metadata()), blobs)
        await self.wait_for(number)

    async def wait_for(self, number: int) -> None:
        """Return when the device has said that it runs the version."""
        async with asyncio.timeout(SWAP_TIMEOUT_S):
            while True:
                for item in await self._link.receive():
                    said = item.document if isinstance(item, FromDevice) else None
                    if isinstance(said, Status) and said.online and said.version == number:
                        return

    @contextmanager
    def running_device(self, directory: Path) -> Iterator[Server]:
        """Run the agent that lives in `directory` until it is live, not yet that it has a version."""
        port, uds = find_free_port(), directory / "s"
        (directory / "root.json").write_bytes(self._repository.load_root())
        config_path = directory / "edge-agent.toml"
        config_path.write_text(
            f'device_id = "{DEVICE}"\nfleet = "{FLEET}"\nmodel = "{self._model}"\nstate_dir = "state"\n'
            f'tuf_root_path = "root.json"\n[http]\nport = {port}\nuds = "{uds}"\n'
            f"[broker]\nport = {self._broker_port}\n"
        )
        command = [sys.executable, "-m", "edge_agent", "run", "--config", str(config_path)]
        path = "/v2/health/ready" if (directory / "state" / "slots" / "state.json").exists() else "/v2/health/live"
        with running_server(command, port=port, directory=directory, uds=uds, ready_path=path) as server:
            yield server


@asynccontextmanager
async def _coordinating(path: Path, broker_port: int, model: str) -> AsyncIterator[_Fleet]:
    async with Link(host="127.0.0.1", port=broker_port, fleet=FLEET) as link:
        while Connected() not in await link.receive():
            pass
        yield _Fleet(path, link, broker_port, model)


def _keep_sample(agent: Server, version: BenchVersion) -> None:
    """Have the store opened, by a sample in it."""
    sample = {"x": version.x[0].tolist(), "y": int(version.y[0])}
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(agent.uds)), base_url="http://device") as client:
        client.post("/v1/samples", json={"samples": [sample]}).raise_for_status()


def _rest(server: Server) -> float:
    """Return the resident memory once it no longer changes."""
    before = server.measure_resident_mb()
    while True:
        time.sleep(REST_S)
        now = server.measure_resident_mb()
        if abs(now - before) < REST_MB:
            return now
        before = now
