"""What a device never accepts again, whatever was wiped and whatever the clock says."""

import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from edge_agent.errors import StalledError
from edge_agent.updates.fetcher import open_offer
from edge_agent.updates.told_floors import keep_told, load_floors
from fl_server.directory import Directory
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rollout.trust import ONLINE_ROLES, Rotation
from models.contract.floors import Floor, Floors
from models.contract.offer import build_offer, parse_offer
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import ReleaseServer

MONTH = timedelta(days=30)


@pytest.fixture
def server(tmp_path: Path) -> ReleaseServer:
    return ReleaseServer(tmp_path / "server", MemoryBroker())


@pytest.fixture
def trust_dir(tmp_path: Path) -> Path:
    return tmp_path / "state" / "tuf"


def build(repository: ReleaseRepository) -> bytes:
    return build_offer(repository.load_metadata())


def steal(server: ReleaseServer, path: Path) -> ReleaseRepository:
    """Return the repository as somebody has it who copied the coordinator's machine."""
    shutil.copytree(server.directory.path, path)
    shutil.rmtree(Directory(path).offline_keys_dir)
    return ReleaseRepository(Directory(path))


def test_older_offer_is_refused_when_the_folder_of_what_is_trusted_is_gone(
    server: ReleaseServer, trust_dir: Path
) -> None:
    old = server.release(server.write_version(1, b"one"))
    new = server.release(server.write_version(2, b"two"))
    open_offer(new, root=server.root, trust_dir=trust_dir)
    shutil.rmtree(trust_dir)
    with pytest.raises(StalledError, match=r"timestamp version 3 is older than 4, seen before"):
        open_offer(old, root=server.root, trust_dir=trust_dir)
    open_offer(new, root=server.root, trust_dir=trust_dir)


def test_clock_that_was_set_back_makes_no_expired_offer_valid(server: ReleaseServer, trust_dir: Path) -> None:
    server.repository.renew(ONLINE_ROLES, now=server.now + MONTH)  # the clock of this machine is a month behind
    open_offer(build(server.repository), root=server.root, trust_dir=trust_dir)
    server.repository.renew(("timestamp",), now=server.now)  # newer, and valid by this clock alone
    frozen = build(server.repository)
    for _ in range(2):
        with pytest.raises(StalledError, match=r"snapshot\.json is expired|timestamp\.json is expired"):
            open_offer(frozen, root=server.root, trust_dir=trust_dir)
        shutil.rmtree(trust_dir)
    server.repository.renew(("timestamp",), now=server.now + MONTH + timedelta(hours=1))
    open_offer(build(server.repository), root=server.root, trust_dir=trust_dir)


def test_versions_and_times_of_a_thief_bind_nobody_once_the_keys_are_replaced(
    tmp_path: Path, server: ReleaseServer, trust_dir: Path
) -> None:
    thief = steal(server, tmp_path / "thief")
    for _ in range(5):
        thief.renew(ONLINE_ROLES, now=server.now + 10 * MONTH)
    open_offer(build(thief), root=server.root, trust_dir=trust_dir)
    with pytest.raises(StalledError, match="version"):
        open_offer(build(server.repository), root=server.root, trust_dir=trust_dir)
    server.repository.rotate(Rotation(roles=ONLINE_ROLES), now=server.now)
    open_offer(build(server.repository), root=server.root, trust_dir=trust_dir)
    shutil.rmtree(trust_dir)
    with pytest.raises(StalledError, match="root version 1 is older than 2"):
        open_offer(build(thief), root=server.root, trust_dir=trust_dir)


def test_new_root_holds_even_if_the_rest_of_its_offer_is_refused(
    tmp_path: Path, server: ReleaseServer, trust_dir: Path
) -> None:
    thief = steal(server, tmp_path / "thief")
    open_offer(build(server.repository), root=server.root, trust_dir=trust_dir)
    server.repository.rotate(Rotation(roles=ONLINE_ROLES), now=server.now)
    stolen = build(thief)
    open_offer(stolen, root=server.root, trust_dir=trust_dir)
    root = server.repository.load_metadata()["2.root.json"]
    for offer in (build_offer(parse_offer(stolen) | {"2.root.json": root}), stolen):
        with pytest.raises(StalledError, match="timestamp was signed by 0/1 keys"):
            open_offer(offer, root=server.root, trust_dir=trust_dir)


def test_floors_that_a_command_told_hold_for_a_wiped_device_and_never_fall(
    tmp_path: Path, server: ReleaseServer, trust_dir: Path
) -> None:
    old = server.release(server.write_version(1, b"one"))
    before = server.repository.build_floors()
    server.repository.renew(ONLINE_ROLES, now=server.now + MONTH)
    told_path = tmp_path / "told.json"
    for floors in (server.repository.build_floors(), before):
        keep_told(told_path, floors)
        with pytest.raises(StalledError, match="told by the coordinator"):
            open_offer(old, root=server.root, trust_dir=trust_dir, told=(told_path,))
    server.repository.renew(("timestamp",), now=server.now)  # newer, and valid by this machine's clock alone
    with pytest.raises(StalledError, match=r"is expired"):
        open_offer(build(server.repository), root=server.root, trust_dir=trust_dir, told=(told_path,))
    server.repository.renew(ONLINE_ROLES, now=server.now + MONTH)
    open_offer(build(server.repository), root=server.root, trust_dir=trust_dir, told=(told_path,))


def test_floors_that_a_thief_told_bind_nobody_once_the_online_keys_are_replaced(
    tmp_path: Path, server: ReleaseServer, trust_dir: Path
) -> None:
    genuine = server.repository.build_floors()
    roles = {role: replace(floor, version=10**6) for role, floor in genuine.roles.items()}
    roles |= {role: Floor(version=10**6, keys="0" * 64) for role in ("root", "targets", "graphs")}
    keep_told(told_path := tmp_path / "told.json", Floors(roles=roles, signed_at=server.now + 100 * MONTH))
    with pytest.raises(StalledError, match="is older than 1000000"):
        open_offer(build(server.repository), root=server.root, trust_dir=trust_dir, told=(told_path,))
    server.repository.rotate(Rotation(roles=ONLINE_ROLES), now=server.now)
    open_offer(build(server.repository), root=server.root, trust_dir=trust_dir, told=(told_path,))
    keep_told(told_path, server.repository.build_floors())
    assert load_floors(told_path) == server.repository.build_floors()


def test_floors_that_cannot_be_read_are_not_taken_for_none(server: ReleaseServer, trust_dir: Path) -> None:
    offer = build(server.repository)
    open_offer(offer, root=server.root, trust_dir=trust_dir)
    (trust_dir.parent / "tuf-floors.json").write_bytes(b"\x00")
    with pytest.raises(StalledError, match=r"tuf-floors\.json is unreadable"):
        open_offer(offer, root=server.root, trust_dir=trust_dir)
