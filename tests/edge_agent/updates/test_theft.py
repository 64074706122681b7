"""The coordinator's online keys are stolen, and the fleet is won back through a real broker."""

import asyncio
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

from edge_agent.updates.verifier import verify_offer
from fl_server.directory import Directory
from fl_server.fleet.mqtt import Connected
from fl_server.fleet.mqtt import Link as CoordinatorLink
from fl_server.rollout.publisher import Publisher, list_blobs
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rollout.trust import ONLINE_ROLES, Rotation
from models.contract.encoding import build_digest
from models.contract.manifest import MANIFEST_NAME
from models.contract.messages import EventKind
from models.contract.offer import build_offer
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.releases import FLEET, MODEL, ReleaseServer, running_device


def test_replaced_keys_win_a_fleet_back_from_who_stole_the_online_keys(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        asyncio.run(_steal_and_recover(tmp_path, broker.port))


async def _steal_and_recover(tmp_path: Path, port: int) -> None:
    server = await asyncio.to_thread(ReleaseServer, tmp_path / "server", MemoryBroker())
    genuine_dir, evil_dir = server.write_version(1, b"genuine"), server.write_version(2, b"evil")
    server.sign_graphs(genuine_dir)
    _set_champion(server.repository, genuine_dir, server)
    stolen = Directory(tmp_path / "stolen")
    shutil.copytree(server.directory.path, stolen.path)
    shutil.rmtree(stolen.offline_keys_dir)
    thief = ReleaseRepository(stolen)
    async with (
        running_device(tmp_path / "device", port, server.root) as (device, offers),
        asyncio.timeout(60),
        CoordinatorLink(host="127.0.0.1", port=port, fleet=FLEET) as link,
    ):
        in_child = partial(verify_offer, root=server.root, trust_dir=tmp_path / "device" / "tuf")
        device.updater._open_offer = in_child
        while Connected() not in await link.receive():
            pass

        async def offer(repository: ReleaseRepository, version_dir: Path) -> tuple[EventKind, str]:
            pem = repository.build_coordinator_pem()
            publisher = Publisher(
                fleet=FLEET, record_path=version_dir / f"{repository is thief}.json", publish=link.publish
            )
            await publisher.publish(
                build_offer(repository.load_metadata()), {build_digest(pem): pem, **list_blobs(version_dir)}
            )
            await device.updater.handle_offer(await offers.get())
            kind, message, _ = device.events[-1]
            return kind, message

        assert await offer(server.repository, genuine_dir) == (EventKind.UPDATED, "version 1 serves from slot a")
        _set_champion(thief, evil_dir, server)
        for _ in range(5):  # far ahead, and a year ahead: what is genuine shall look old and expired
            thief.renew(ONLINE_ROLES, now=server.now + timedelta(days=360))
        assert await offer(thief, evil_dir) == (EventKind.UPDATED, "version 2 serves from slot b")
        assert "offer refused" in (await offer(server.repository, genuine_dir))[1]

        server.repository.rotate(Rotation(roles=ONLINE_ROLES), now=server.now)
        assert await offer(server.repository, genuine_dir) == (EventKind.UPDATED, "version 1 serves from slot a")
        assert device.serving == b"genuine"
        kind, message = await offer(thief, evil_dir)
        assert (kind, device.serving) == (EventKind.FAILED, b"genuine")
        assert "timestamp was signed by 0/1 keys" in message


def _set_champion(repository: ReleaseRepository, version_dir: Path, server: ReleaseServer) -> None:
    repository.set_release(MODEL, {"champion": (version_dir / MANIFEST_NAME).read_bytes()}, now=server.now)
