"""Offers that a hostile or broken broker may serve: refused with one event, and nothing changes."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import zstandard
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from edge_agent.updates.watch import OfferWatch
from fl_server.directory import Directory
from fl_server.rollout.keys import load_key
from fl_server.rollout.trust import LIFETIMES
from models.contract.manifest import MANIFEST_NAME, parse_manifest
from models.contract.messages import EventKind
from models.contract.offer import build_graph_target, build_offer, parse_offer
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import Device, ReleaseServer


@pytest.fixture
def device(tmp_path: Path, broker: MemoryBroker, server: ReleaseServer) -> Device:
    """A device on version 1."""
    device = Device(tmp_path / "device", broker, server.root)
    device.receive(server.release(server.write_version(1, b"one")))
    device.events.clear()
    return device


def assert_refused(device: Device, offer: bytes, reason: str) -> None:
    trusted = (device.path / "tuf" / "trusted.json").read_bytes()
    assert device.receive(offer) == [EventKind.FAILED]
    message = device.last_message
    assert reason in message
    assert "\n" not in message
    assert (device.version, device.serving) == (1, b"one")
    assert (device.path / "tuf" / "trusted.json").read_bytes() == trusted
    device.events.clear()


def sign(directory: Directory, metadata: Metadata, *names: str) -> bytes:
    metadata.signatures.clear()
    for name in names:
        folder = directory.online_keys_dir if (directory.online_keys_dir / f"{name}.pem").exists() else None
        path = (folder or directory.offline_keys_dir) / f"{name}.pem"
        metadata.sign(CryptoSigner(load_key(path)), append=True)
    return metadata.to_bytes()


def test_offer_signed_by_foreign_keys_is_refused(tmp_path: Path, broker: MemoryBroker, device: Device) -> None:
    foreign = ReleaseServer(tmp_path / "foreign", broker)
    offer = foreign.release(foreign.write_version(2, b"two"))
    assert_refused(device, offer, "was signed by 0/1 keys")


def test_root_that_too_few_keys_signed_is_refused(server: ReleaseServer, device: Device) -> None:
    files = server.repository.load_metadata()
    root = Metadata[Root].from_bytes(files["1.root.json"])
    root.signed.version = 2
    files["2.root.json"] = sign(server.directory, root, "root-1")
    assert_refused(device, build_offer(files), "root was signed by 1/2 keys")
    files["2.root.json"] = sign(server.directory, root, "root-1", "root-3")
    assert device.receive(build_offer(files)) == []


def test_older_offer_is_refused(server: ReleaseServer, device: Device) -> None:
    old = build_offer(server.repository.load_metadata())
    server.repository.refresh_expiring(server.now + timedelta(hours=20))
    device.receive(build_offer(server.repository.load_metadata()))
    assert_refused(device, old, "timestamp version")


def test_expired_offer_is_refused(tmp_path: Path, broker: MemoryBroker) -> None:
    server = ReleaseServer(tmp_path / "old", broker, now=datetime.now(UTC) - timedelta(days=3))
    offer = server.release(server.write_version(1, b"one"))
    device = Device(tmp_path / "fresh", broker, server.root)
    assert device.receive(offer) == [EventKind.FAILED]
    assert "timestamp.json is expired" in device.last_message
    server.repository.refresh_expiring(datetime.now(UTC))
    assert device.receive(build_offer(server.repository.load_metadata()))[-1] is EventKind.UPDATED


def test_offer_that_stays_until_it_has_expired_is_told(server: ReleaseServer, device: Device) -> None:
    lifetime = LIFETIMES["timestamp"]
    server.repository.renew(("timestamp",), now=datetime.now(UTC) - lifetime + timedelta(seconds=3))
    offer = build_offer(server.repository.load_metadata())

    async def freeze() -> None:
        watch = OfferWatch(device.updater.handle_offer, interval_s=0.1)
        await watch.take(offer)
        checking = asyncio.create_task(watch.keep_checking())
        async with asyncio.timeout(30):
            while not device.events:  # noqa: ASYNC110 - the updater has no reason to tell a test
                await asyncio.sleep(0.05)
        checking.cancel()
        await asyncio.wait({checking})
        await device.updater.close()

    asyncio.run(freeze())
    assert "timestamp.json is expired" in device.last_message
    assert device.version == 1


def test_half_an_offer_is_refused_and_the_whole_one_still_works(server: ReleaseServer, device: Device) -> None:
    old = build_offer(server.repository.load_metadata())
    whole = parse_offer(server.release(server.write_version(2, b"two")))
    for name in whole.keys() - {"1.root.json", "1.targets.json", "2.graphs.json"}:  # the device has these
        assert_refused(device, build_offer({key: data for key, data in whole.items() if key != name}), name)
    assert device.receive(old) == []
    assert device.receive(build_offer(whole))[-1] is EventKind.UPDATED


def test_mix_of_old_and_new_metadata_is_refused(server: ReleaseServer, device: Device) -> None:
    old = server.repository.load_metadata()
    new = parse_offer(server.release(server.write_version(2, b"two")))
    old_snapshot, new_snapshot = (_get_name(files, "snapshot") for files in (old, new))
    old_releases, new_releases = (_get_name(files, "releases") for files in (old, new))
    assert_refused(device, build_offer(new | {new_snapshot: old[old_snapshot]}), "Expected snapshot version")
    assert_refused(device, build_offer(new | {new_releases: old[old_releases]}), "Expected releases v")


def test_bomb_is_refused_in_bounded_memory(device: Device) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    assert len(bomb) < 8192
    assert_refused(device, bomb, "at most 262144 are read")


@pytest.mark.parametrize(
    "build",
    [
        lambda: b"",
        lambda: b"junk",
        lambda: _compress(b"[]"),
        lambda: _compress(b'{"metadata": {"../x.json": ""}}'),
        lambda: _compress(b'{"metadata": {"timestamp.json": "\\ud800"}}'),
        lambda: _compress(b'{"metadata": {"timestamp.json": 1}}'),
        lambda: _compress(b'{"metadata": {}}'),
        lambda: _compress(json.dumps({"metadata": {"timestamp.json": "[" * 100_000}}).encode()),
        lambda: _compress(json.dumps({"metadata": {"timestamp.json": '{"signed": {"_type": 3}}'}}).encode()),
        lambda: _compress(b'{"metadata": {"timestamp.json": "x"}}')[:-3],
    ],
)
def test_junk_is_refused(device: Device, build: Callable[[], bytes]) -> None:
    assert_refused(device, build(), "offer refused")


def test_graph_that_the_offline_role_did_not_sign_is_refused_until_it_does(
    server: ReleaseServer, device: Device
) -> None:
    version_dir = server.write_version(2, b"two", graph=b"no clipping")
    assert device.receive(server.release(version_dir, signs_graphs=False)) == [EventKind.FAILED]
    assert "is not signed by the offline role" in device.last_message
    assert (device.version, device.serving) == (1, b"one")
    server.sign_graphs(version_dir)
    assert device.receive(server.publish(version_dir))[-1] is EventKind.UPDATED


@pytest.mark.parametrize("role", ["graphs", "releases"])
def test_stolen_online_keys_cannot_sign_a_graph(server: ReleaseServer, device: Device, role: str) -> None:
    version_dir = server.write_version(2, b"two", graph=b"no clipping")
    files = parse_offer(server.release(version_dir, signs_graphs=False))
    manifest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes())
    stolen = Metadata[Targets].from_bytes(files[_get_name(files, role)])
    template = next(iter(Metadata[Targets].from_bytes(files[_get_name(files, "graphs")]).signed.targets.values()))
    for name in ("train_step.onnx", "evaluate.onnx"):
        entry = manifest.files[name]
        target = type(template)(entry.size_bytes, {"sha256": entry.digest}, build_graph_target(entry.digest, name))
        stolen.signed.targets[target.path] = target
    stolen.signed.version += 1
    files[f"{stolen.signed.version}.{role}.json"] = sign(server.directory, stolen, "releases")
    snapshot = Metadata[Snapshot].from_bytes(files[_get_name(files, "snapshot")])
    snapshot.signed.version += 1
    snapshot.signed.meta[f"{role}.json"].version = stolen.signed.version
    files[f"{snapshot.signed.version}.snapshot.json"] = sign(server.directory, snapshot, "snapshot")
    timestamp = Metadata[Timestamp].from_bytes(files["timestamp.json"])
    timestamp.signed.version += 1
    timestamp.signed.snapshot_meta.version = snapshot.signed.version
    files["timestamp.json"] = sign(server.directory, timestamp, "timestamp")
    assert device.receive(build_offer(files)) == [EventKind.FAILED]
    assert ("graphs was signed by 0/1 keys" if role == "graphs" else "offline role") in device.last_message
    assert device.version == 1


def test_offer_is_never_read_with_a_damaged_memory_of_what_was_trusted(server: ReleaseServer, device: Device) -> None:
    (device.path / "tuf" / "trusted.json").write_bytes(b"\x00")
    assert device.receive(server.release(server.write_version(2, b"two")))[-1] is EventKind.UPDATED


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def _get_name(files: dict[str, bytes], role: str) -> str:
    return next(name for name in files if name.endswith(f".{role}.json"))
