"""Weights that come as a delta to those in a slot, and whole wherever that does not give what was signed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from models.contract.encoding import build_digest
from models.contract.messages import EventKind
from models.tensors.delta import build_delta
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import TRAITS, Device, ReleaseServer

OLD = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()
NEW = (np.frombuffer(OLD, np.uint8) + np.random.default_rng(1).integers(-1, 2, len(OLD)).astype(np.uint8)).tobytes()
DELTA = build_delta(OLD, NEW)
TEMPLATE = b"template"


@pytest.fixture
def device(tmp_path: Path, broker: MemoryBroker, server: ReleaseServer) -> Device:
    """A device that holds the old weights and has read nothing since."""
    device = Device(tmp_path / "device", broker, server.root)
    device.receive(server.release(server.write_version(1, TEMPLATE, weights=OLD)))
    assert device.serving == TEMPLATE + OLD
    broker.reads.clear()
    device.events.clear()
    return device


def offer_second(server: ReleaseServer, delta: bytes = DELTA, *, base: bytes = OLD) -> bytes:
    return server.release(server.write_version(2, TEMPLATE, weights=NEW, deltas={base: delta}))


def has_read(broker: MemoryBroker, blob: bytes) -> bool:
    return any(build_digest(blob) in topic for topic in broker.reads)


def test_device_that_holds_the_base_fetches_the_delta_alone(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    device.receive(offer_second(server))
    assert device.serving == TEMPLATE + NEW
    assert has_read(broker, DELTA)
    assert not has_read(broker, NEW)
    assert not has_read(broker, TEMPLATE)
    assert device.events[0] == (EventKind.DOWNLOADING, f"1 files, {len(DELTA)} bytes", 2)
    assert not list((device.path / "downloads" / "versions").iterdir())


def test_device_whose_base_lies_in_the_other_slot_takes_the_delta_too(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    middle = NEW[::-1]
    device.receive(server.release(server.write_version(3, TEMPLATE, weights=middle)))
    broker.reads.clear()
    device.receive(offer_second(server))
    assert device.serving == TEMPLATE + NEW
    assert not has_read(broker, NEW)


def test_device_without_the_base_fetches_the_weights_and_never_asks_for_the_delta(
    tmp_path: Path, broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = offer_second(server, base=b"weights of yet another version")
    fresh = Device(tmp_path / "fresh", broker, server.root)
    for each in (device, fresh):
        each.receive(offer)
        assert each.serving == TEMPLATE + NEW
    assert not has_read(broker, DELTA)


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        (build_delta(OLD, OLD), "was made with digest"),
        (build_delta(OLD[:-1], NEW[:-1]), "end before the 200000 bytes"),
        (BOMB, "goes on behind the 200000 bytes"),
        (b"no delta at all", "no delta"),
    ],
    ids=["to other weights", "too short", "bomb", "junk"],
)
def test_delta_that_does_not_lead_to_the_signed_weights_costs_a_whole_fetch_and_no_more(
    broker: MemoryBroker, server: ReleaseServer, device: Device, delta: bytes, said: str
) -> None:
    device.receive(offer_second(server, delta))
    assert device.serving == TEMPLATE + NEW
    again = device.events[1]
    assert again[0] is EventKind.DOWNLOADING
    assert again[1].startswith(f"1 files, {len(NEW)} bytes, without the delta: ")
    assert said in again[1]
    assert EventKind.FAILED not in [kind for kind, _, _ in device.events]


@pytest.mark.parametrize("change", [lambda _: None, lambda chunk: chunk[:-1], lambda chunk: bytes(len(chunk))])
def test_delta_that_is_missing_or_altered_on_the_broker_costs_a_whole_fetch_and_no_more(
    broker: MemoryBroker, server: ReleaseServer, device: Device, change: Callable[[bytes], bytes | None]
) -> None:
    offer = offer_second(server)
    (topic,) = broker.get_chunks(build_digest(DELTA))
    changed = change(broker.retained.pop(topic))
    if changed is not None:
        broker.retained[topic] = changed
    device.receive(offer)
    assert device.serving == TEMPLATE + NEW


def test_whole_fetch_after_a_failed_delta_resumes_with_what_is_missing(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = offer_second(server, b"no delta at all")
    topic = broker.get_chunks(build_digest(NEW))[2]
    chunk = broker.retained.pop(topic)
    device.receive(offer)
    assert "chunk 2 of 4" in device.last_message
    assert device.version == 1
    broker.retained[topic] = chunk
    broker.reads.clear()
    again = Device(device.path, broker, server.root)
    again.receive(offer)
    assert again.serving == TEMPLATE + NEW
    assert [read for read in broker.reads if build_digest(NEW) in read] == [topic]


def test_bit_flipped_in_the_weights_brings_back_the_previous_version_and_is_no_base(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    offer = offer_second(server)
    device.receive(offer)
    current = device.updater.current()
    assert current is not None
    path = current.directory / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    again = Device(device.path, broker, server.root)
    assert again.version == 1
    assert again.receive(offer)[-1] is EventKind.UPDATED
    assert "weights.bin in slot b is damaged; version 1 serves" in again.events[0][1]
    assert again.serving == TEMPLATE + NEW


@pytest.mark.parametrize("delta", [DELTA, b"no delta at all"], ids=["genuine", "junk"])
def test_tflite_graph_comes_as_a_delta_to_the_whole_one_in_a_slot(
    tmp_path: Path, broker: MemoryBroker, server: ReleaseServer, delta: bytes
) -> None:
    device = Device(tmp_path / "device", broker, server.root, traits=replace(TRAITS, runtimes=("tflite",)))
    device.receive(server.release(server.write_version(1, OLD, runtime="tflite")))
    broker.reads.clear()
    device.receive(server.release(server.write_version(2, NEW, runtime="tflite", deltas={OLD: delta})))
    assert device.serving == NEW
    assert has_read(broker, delta)
    assert has_read(broker, NEW) == (delta != DELTA)


def test_version_whose_graph_holds_its_weights_is_followed_by_one_that_does_not(
    tmp_path: Path, broker: MemoryBroker, server: ReleaseServer
) -> None:
    device = Device(tmp_path / "old", broker, server.root)
    whole_dir = server.write_version(1, b"whole graph")
    device.receive(server.release(whole_dir))
    again = Device(device.path, broker, server.root)
    assert again.version == 1, "what an agent before weights.bin left on disk"
    again.receive(offer_second(server))
    assert again.serving == TEMPLATE + NEW
    again.receive(server.release(whole_dir))
    assert again.serving == b"whole graph"
