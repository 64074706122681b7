"""A federation that is restored from its backup is behind its fleet, and wins it back."""

import shutil
from pathlib import Path

import pytest

from edge_agent.errors import StalledError
from edge_agent.updates.fetcher import open_offer
from fl_server.__main__ import main
from fl_server.directory import Directory
from fl_server.rollout.repository import ReleaseRepository
from models.contract.offer import build_offer
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.federation import FLEET, Federation
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.observer import Observer
from tests.simulators.releases import ReleaseServer
from tests.simulators.waiting import wait_until


class Device:
    """What a device trusts, and whether it takes an offer of a federation's directory."""

    def __init__(self, directory: Path, root: bytes) -> None:
        self._trust_dir, self._root = directory / "tuf", root

    def take(self, offer: bytes) -> None:
        open_offer(offer, root=self._root, trust_dir=self._trust_dir)

    def take_from(self, directory: Path) -> None:
        self.take(build_offer(ReleaseRepository(Directory(directory)).load_metadata()))


def test_a_restored_coordinator_is_believed_again_once_it_has_outrun_what_devices_saw(tmp_path, template):
    with Mosquitto(tmp_path) as broker, Federation(tmp_path / "f", template, broker_port=broker.port) as federation:
        directory, backup_dir = federation.directory, tmp_path / "backup"
        repository = ReleaseRepository(Directory(directory))
        device = Device(tmp_path / "device", repository.load_root())
        shutil.copytree(directory, backup_dir)
        for _ in range(3):
            assert main(["keys", "renew", "releases", "--config", str(federation.config_path)]) == 0
        device.take_from(directory)

        shutil.rmtree(directory)
        shutil.copytree(backup_dir, directory)
        with pytest.raises(StalledError, match="New timestamp version 1 must be >= 4"):
            device.take_from(directory)
        assert main(["keys", "renew", "--restored", "--config", str(federation.config_path)]) == 0
        federation.start()
        with Observer(broker.port) as observer:
            wait_until(lambda: observer.seen(f"{FLEET}/offer"), "the restored coordinator to publish", timeout_s=60)
            device.take(observer.seen(f"{FLEET}/offer")[-1].payload)


def test_what_an_offline_key_signed_after_the_backup_needs_that_key_again(tmp_path, capsys):
    server = ReleaseServer(tmp_path / "server", MemoryBroker())
    directory, backup_dir = server.directory, tmp_path / "backup"
    directory.database_path.touch()
    directory.config_path.write_text('fleet = "demo"\n')
    device = Device(tmp_path / "device", server.root)
    shutil.copytree(directory.path, backup_dir)
    sticks = Path(shutil.move(directory.offline_keys_dir, tmp_path / "sticks"))
    shutil.copytree(sticks, directory.offline_keys_dir)
    server.sign_graphs(server.write_version(1, b"one"))
    device.take_from(directory.path)

    shutil.rmtree(directory.path)
    shutil.copytree(backup_dir, directory.path)
    shutil.rmtree(directory.offline_keys_dir)
    renewing = ["keys", "renew", "--restored", "--config", str(directory.config_path)]
    assert main(renewing) == 0
    with pytest.raises(StalledError, match="graphs"):
        device.take_from(directory.path)
    assert main([*renewing, "graphs"]) == 1
    assert "--keys" in capsys.readouterr().err
    assert main([*renewing, "root"]) == 2
    assert main([*renewing, "graphs", "--keys", str(sticks)]) == 0
    device.take_from(directory.path)
