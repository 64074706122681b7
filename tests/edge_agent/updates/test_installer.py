"""From offer to active slot, between a real repository and a broker in memory."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.updates.machine import Phase
from fl_server.rollout.repository import _build_target
from models.contract.encoding import build_digest
from models.contract.manifest import MANIFEST_NAME, PARAMETERS_NAME, FileEntry, ModelManifest, parse_manifest
from models.contract.messages import EventKind
from models.contract.offer import ROLE_RELEASES, build_offer, build_release_target
from models.contract.terms import ReleaseTerms, build_terms
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import BIG, Device, ReleaseServer

HAPPY = [EventKind.DOWNLOADING, EventKind.DOWNLOADED, EventKind.VERIFIED, EventKind.UPDATING, EventKind.UPDATED]


@pytest.fixture
def device(tmp_path: Path, broker: MemoryBroker, server: ReleaseServer) -> Device:
    return Device(tmp_path / "device", broker, server.root)


def restart(device: Device, broker: MemoryBroker, server: ReleaseServer, **settings: object) -> Device:
    return Device(device.path, broker, server.root, **settings)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the updater has no reason to tell a test
            await asyncio.sleep(0.01)


def test_device_follows_the_champion_over_two_versions_and_fetches_only_what_changed(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    assert device.receive(server.release(server.write_version(1, b"one" + BIG))) == HAPPY
    assert (device.version, device.serving) == (1, b"one" + BIG)
    broker.reads.clear()
    second_dir = server.write_version(2, b"two" + BIG)
    assert device.receive(server.release(second_dir)) == HAPPY * 2
    assert (device.version, device.serving) == (2, b"two" + BIG)
    expected = [build_digest((second_dir / MANIFEST_NAME).read_bytes()), build_digest(b"two" + BIG)]
    assert {topic.split("/")[4] for topic in broker.reads} == set(expected)
    assert broker.concurrent_max == 4
    assert not list((device.path / "downloads" / "versions").iterdir())


def test_long_download_says_how_far_it_is_and_counts_what_was_here(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = server.release(server.write_version(1, b"one" + 5 * BIG, trains=False))
    topic = broker.get_chunks(build_digest(b"one" + 5 * BIG))[12]  # of 20
    chunk = broker.retained.pop(topic)
    device.receive(offer)
    device.events.clear()
    broker.retained[topic] = chunk
    device.receive(offer)
    said = [message for kind, message, _ in device.events if kind is EventKind.DOWNLOADING]
    assert said == ["1 files, 1280003 bytes", "75 % of 1 files, 1280003 bytes"]


def test_float_parameters_are_neither_published_nor_staged(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    version_dir = server.write_version(1, b"one")
    device.receive(server.release(version_dir))
    digest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes()).files[PARAMETERS_NAME].digest
    assert not broker.get_chunks(digest)
    current = device.updater.current()
    assert current is not None
    assert sorted(path.name for path in current.directory.iterdir()) == [
        "evaluate.onnx",
        "inference.onnx",
        MANIFEST_NAME,
        "train_step.onnx",
    ]


def test_device_that_only_serves_takes_no_graphs_until_it_trains(
    broker: MemoryBroker, server: ReleaseServer, tmp_path: Path
) -> None:
    offer = server.release(server.write_version(1, b"one" + BIG))
    device = Device(tmp_path / "device", broker, server.root, trains=False)
    device.receive(offer)
    current = device.updater.current()
    assert current is not None
    assert not (current.directory / "train_step.onnx").exists()
    broker.reads.clear()
    device = restart(device, broker, server, trains=True)
    assert device.receive(offer) == HAPPY
    assert not any(build_digest(b"one" + BIG) in topic for topic in broker.reads)


def test_coordinator_key_is_saved_and_follows_the_repository(server: ReleaseServer, device: Device) -> None:
    device.receive(server.release(server.write_version(1, b"one")))
    assert device.updater.coordinator_key_path.read_bytes() == server.repository.build_coordinator_pem()


def test_same_offer_again_does_nothing(broker: MemoryBroker, server: ReleaseServer, device: Device) -> None:
    offer = server.release(server.write_version(1, b"one"))
    device.receive(offer)
    broker.reads.clear()
    assert device.receive(offer) == HAPPY
    assert not broker.reads


def test_offer_of_a_restarted_device_does_nothing(broker: MemoryBroker, server: ReleaseServer, device: Device) -> None:
    offer = server.release(server.write_version(1, b"one"))
    device.receive(offer)
    device = restart(device, broker, server)
    assert device.version == 1
    assert device.receive(offer) == []


def test_altered_chunk_is_discarded_and_fetched_again(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    device.receive(server.release(server.write_version(1, b"one")))
    offer = server.release(server.write_version(2, b"two" + BIG))
    topic = broker.get_chunks(build_digest(b"two" + BIG))[1]
    good, broker.retained[topic] = broker.retained[topic], bytes(len(broker.retained[topic]))
    assert device.receive(offer)[-1] is EventKind.FAILED
    assert "was discarded" in device.last_message
    assert device.version == 1
    broker.retained[topic] = good
    assert device.receive(offer)[-1] is EventKind.UPDATED


def test_missing_chunk_keeps_the_others_and_is_all_that_is_fetched_later(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = server.release(server.write_version(1, b"one" + BIG))
    topic = broker.get_chunks(build_digest(b"one" + BIG))[3]
    chunk = broker.retained.pop(topic)
    device.receive(offer)
    assert "chunk 3 of 4" in device.last_message
    broker.retained[topic] = chunk
    broker.reads.clear()
    device = restart(device, broker, server)
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert [read for read in broker.reads if build_digest(b"one" + BIG) in read] == [topic]


@pytest.mark.parametrize(
    "change", [lambda chunk: chunk[:-1], lambda chunk: chunk + b"x", lambda _: b"", lambda _: BIG * 20]
)
def test_chunk_of_a_wrong_length_is_refused_and_not_kept(
    broker: MemoryBroker, server: ReleaseServer, device: Device, change
) -> None:
    offer = server.release(server.write_version(1, b"one" + BIG))
    topic = broker.get_chunks(build_digest(b"one" + BIG))[0]
    broker.retained[topic] = change(good := broker.retained[topic])
    assert device.receive(offer)[-1] is EventKind.FAILED
    assert "expected 65536" in device.last_message
    broker.retained[topic] = good
    assert device.receive(offer)[-1] is EventKind.UPDATED


def test_one_deadline_bounds_the_whole_fetch(broker: MemoryBroker, server: ReleaseServer, tmp_path: Path) -> None:
    offer = server.release(server.write_version(1, b"one" + BIG))
    broker.stalled.add(broker.get_chunks(build_digest(b"one" + BIG))[2])
    device = Device(tmp_path / "device", broker, server.root, deadline_s=0.2)
    assert device.receive(offer)[-1] is EventKind.FAILED
    assert "not complete within" in device.last_message


def test_transient_failure_is_retried_without_a_new_offer(
    broker: MemoryBroker, server: ReleaseServer, tmp_path: Path
) -> None:
    offer = server.release(server.write_version(1, b"one"))
    topic = broker.get_chunks(build_digest(b"one"))[0]
    chunk = broker.retained.pop(topic)
    device = Device(tmp_path / "device", broker, server.root, retry_delay_s=0.01)

    async def scenario() -> None:
        await device.updater.handle_offer(offer)
        assert device.events[-1][0] is EventKind.FAILED
        broker.retained[topic] = chunk
        await until(lambda: device.version is not None)
        await device.updater.close()

    asyncio.run(scenario())
    assert device.version == 1


def test_unhealthy_version_is_rolled_back_and_never_fetched_again(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    device.receive(server.release(server.write_version(1, b"one")))
    offer = server.release(server.write_version(2, b"unhealthy"))
    assert device.receive(offer)[-1] is EventKind.FAILED
    assert "rolled back and never tried again: the output is not finite; version 1 serves on" in device.last_message
    assert (device.version, device.serving) == (1, b"one")
    for again in (device, restart(device, broker, server)):
        broker.reads.clear()
        seen = len(again.events)
        again.receive(offer)
        assert not broker.reads
        assert len(again.events) == seen
    third_dir = server.write_version(3, b"three")
    assert device.receive(server.release(third_dir))[-1] is EventKind.UPDATED


def test_device_that_is_too_busy_for_a_trial_tries_again_later(
    broker: MemoryBroker, server: ReleaseServer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.receive(server.release(server.write_version(1, b"one")))
    offer = server.release(server.write_version(2, b"two"))
    again = restart(device, broker, server, retry_delay_s=0.01)
    busy = iter([True, True])

    def try_version(directory: Path, manifest: ModelManifest) -> None:
        if next(busy, False):
            raise TransientError("this device is too busy")
        again.try_version(directory, manifest)

    monkeypatch.setattr(again.updater._probation, "_try_version", try_version)

    async def receive() -> None:
        await again.updater.start()
        await again.updater.handle_offer(offer)
        assert (again.version, again.updater.phase) == (1, Phase.IDLE)
        await until(lambda: again.version == 2)
        await again.updater.close()

    asyncio.run(receive())
    assert [message for kind, message, _ in again.events if kind is EventKind.FAILED] == ["this device is too busy"] * 2
    assert not again.updater._slots.rejected


def test_rolling_back_the_fleet_needs_no_download(broker: MemoryBroker, server: ReleaseServer, device: Device) -> None:
    first_dir = server.write_version(1, b"one" + BIG)
    device.receive(server.release(first_dir))
    device.receive(server.release(server.write_version(2, b"two" + BIG)))
    offer = server.release(first_dir)
    broker.reads.clear()
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert (device.version, device.serving) == (1, b"one" + BIG)
    assert broker.reads == []


def test_newer_offer_takes_over_a_fetch(broker: MemoryBroker, server: ReleaseServer, device: Device) -> None:
    first = server.release(server.write_version(1, b"one"))
    broker.stalled.add(broker.get_chunks(build_digest(b"one"))[0])
    blobs_of_first = dict(broker.retained)
    second = server.release(server.write_version(2, b"two"))
    broker.retained |= blobs_of_first

    async def scenario() -> None:
        fetching = asyncio.create_task(device.updater.handle_offer(first))
        await broker.wait_until_stalled()
        assert device.updater.phase is Phase.FETCHING
        await device.updater.handle_offer(second)
        await fetching
        await device.updater.close()

    asyncio.run(scenario())
    assert device.version == 2
    assert device.tried == [b"two"]


def test_fetch_of_a_version_that_is_withdrawn_is_given_up(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    first_dir = server.write_version(1, b"one")
    device.receive(server.release(first_dir))
    second = server.release(server.write_version(2, b"two"))
    broker.stalled.add(broker.get_chunks(build_digest(b"two"))[0])

    async def scenario() -> None:
        fetching = asyncio.create_task(device.updater.handle_offer(second))
        await broker.wait_until_stalled()
        server.repository.set_release("digits", {"champion": (first_dir / MANIFEST_NAME).read_bytes()}, now=server.now)
        await device.updater.handle_offer(build_offer(server.repository.load_metadata()))
        await fetching

    asyncio.run(scenario())
    assert (device.version, device.updater.phase) == (1, Phase.IDLE)
    assert device.events[-1][0] is EventKind.DOWNLOADING


def test_verdict_that_the_disk_does_not_take_is_reached_again_later(
    server: ReleaseServer, device: Device, monkeypatch
) -> None:
    device.receive(server.release(server.write_version(1, b"one")))
    offer = server.release(server.write_version(2, b"two"))
    replace, healthy, is_full = os.replace, device.try_version, False

    def try_on_a_disk_that_fills(directory: Path, manifest: ModelManifest) -> None:
        nonlocal is_full
        is_full = len(device.tried) == 1
        healthy(directory, manifest)

    def replace_if_there_is_room(source: str, target: str) -> None:
        if is_full and Path(target).name == "state.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_if_there_is_room)
    device.updater._probation._try_version = try_on_a_disk_that_fills
    assert device.receive(offer)[-1] is EventKind.FAILED
    assert "No space left" in device.last_message
    assert (device.version, device.serving) == (1, b"one")
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert (device.version, device.serving) == (2, b"two")


def test_newer_offer_waits_for_the_trial_under_way(broker: MemoryBroker, server: ReleaseServer, device: Device) -> None:
    first = server.release(server.write_version(1, b"one"))
    blobs_of_first = dict(broker.retained)
    second = server.release(server.write_version(2, b"two"))
    broker.retained |= blobs_of_first
    trying, finish = threading.Event(), threading.Event()

    def slow(directory: Path, manifest: ModelManifest) -> None:
        trying.set()
        assert finish.wait(10)
        device.try_version(directory, manifest)

    device.updater._probation._try_version = slow

    async def scenario() -> None:
        trial = asyncio.create_task(device.updater.handle_offer(first))
        assert await asyncio.to_thread(trying.wait, 10)
        waiting = asyncio.create_task(device.updater.handle_offer(second))
        await until(lambda: device.updater._deferred is not None)
        assert device.updater.phase is Phase.PROBATION
        finish.set()
        await asyncio.gather(trial, waiting)

    asyncio.run(scenario())
    assert device.tried == [b"one", b"two"]
    assert device.version == 2


def test_version_that_hangs_is_given_up_and_changed_back_if_it_answers_after_all(
    broker: MemoryBroker, server: ReleaseServer, tmp_path: Path
) -> None:
    device = Device(tmp_path / "device", broker, server.root, trial_timeout_s=0.1)
    device.receive(server.release(server.write_version(1, b"one")))
    finish = threading.Event()
    healthy = device.try_version

    def hang(directory: Path, manifest: ModelManifest) -> None:
        if manifest.version == 2:
            assert finish.wait(10)
        healthy(directory, manifest)

    device.updater._probation._try_version = hang
    offer = server.release(server.write_version(2, b"two"))

    async def scenario() -> None:
        await device.updater.handle_offer(offer)
        assert "not healthy within" in device.last_message
        finish.set()
        await until(lambda: not device.updater._probation.is_hanging)

    asyncio.run(scenario())
    assert device.tried[-2:] == [b"two", b"one"]
    assert (device.version, device.serving) == (1, b"one")


def test_flipped_bit_in_the_active_slot_brings_back_the_previous_version(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    device.receive(server.release(server.write_version(1, b"one")))
    offer = server.release(server.write_version(2, b"two" + BIG))
    device.receive(offer)
    current = device.updater.current()
    assert current is not None
    path = current.directory / "inference.onnx"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    device = restart(device, broker, server)
    assert device.version == 1
    assert device.receive() == [EventKind.FAILED]
    assert "inference.onnx in slot b is damaged; version 1 serves" in device.last_message
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert device.version == 2


def test_both_slots_damaged_serves_nothing_and_heals_with_the_next_offer(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = server.release(server.write_version(1, b"one"))
    device.receive(offer)
    current = device.updater.current()
    assert current is not None
    (current.directory / "inference.onnx").write_bytes(b"two")
    device = restart(device, broker, server)
    assert device.updater.current() is None
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert device.version == 1


def test_unreadable_state_starts_anew_and_reuses_what_the_slots_hold(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = server.release(server.write_version(1, b"one" + BIG))
    device.receive(offer)
    (device.path / "slots" / "state.json").write_bytes(b"\x00" * 40)
    broker.reads.clear()
    device = restart(device, broker, server)
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert not any(build_digest(b"one" + BIG) in topic for topic in broker.reads)


def test_version_of_another_model_is_refused(server: ReleaseServer, device: Device) -> None:
    version_dir = server.write_version(1, b"text", model="text")
    server.sign_graphs(version_dir)
    manifest = (version_dir / MANIFEST_NAME).read_bytes()
    entry = FileEntry(digest=build_digest(manifest), size_bytes=len(manifest))
    state = server.repository._store.load()
    path = build_release_target("digits", "champion")
    state.targets[ROLE_RELEASES].targets[path] = _build_target(path, entry, build_terms(ReleaseTerms(version=1)))
    server.repository._issue(state, {ROLE_RELEASES}, server.now)
    assert device.receive(server.publish(version_dir))[-1] is EventKind.FAILED
    assert "it is a version of 'text', this device serves 'digits'" in device.last_message
    assert device.version is None
    assert [kind for kind, _, _ in device.events] == [EventKind.FAILED]


def test_fleet_without_a_release_is_no_failure(server: ReleaseServer, device: Device) -> None:
    assert device.receive(server.publish()) == []
    assert device.updater.coordinator_key_path.exists()
