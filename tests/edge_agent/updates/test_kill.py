"""SIGKILL at every change of the disk that an update makes, then a restart."""

import asyncio
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.updates.challenger_slot import ChallengerSlot
from edge_agent.updates.fetcher import open_offer
from edge_agent.updates.slots import TRIES, Slots
from models.contract.messages import EventKind
from models.contract.terms import Split
from models.tensors.delta import build_delta
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.kill import run_and_kill, run_settled
from tests.simulators.releases import BIG, Device, ReleaseServer

assert open_offer, build_delta  # tuf and zstandard are imported before the first child is made, not in each of them


@pytest.fixture
def memory_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a killed process leaves it as it leaves a disk, without the waiting."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


WEIGHTS = BIG[:130_000]  # two chunks
NEXT = WEIGHTS[::-1]
HEALTHY = {"inference": b"two" + BIG}
UNHEALTHY = {"inference": b"unhealthy"}
DELTA = {"inference": b"one" + BIG, "weights": NEXT, "deltas": {WEIGHTS: build_delta(WEIGHTS, NEXT)}}
DELTA_ELSEWHERE = DELTA | {"deltas": {WEIGHTS: build_delta(WEIGHTS, WEIGHTS)}}


@pytest.mark.parametrize(
    ("second", "expected"),
    [(HEALTHY, 2), (UNHEALTHY, 1), (DELTA, 2), (DELTA_ELSEWHERE, 2)],
    ids=["healthy", "unhealthy", "delta", "delta to other weights"],
)
def test_kill_at_any_change_of_the_disk_leaves_a_version_that_verifies_and_an_update_that_ends(
    memory_dir: Path, second: dict, expected: int
) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(memory_dir / "server", broker)
    weights = WEIGHTS if "weights" in second else b""
    first = server.release(server.write_version(1, b"one" + BIG, weights=weights))
    run_settled(lambda: Device(memory_dir / "installed", broker, server.root).receive(first))
    offer = server.release(server.write_version(2, **second, graph=b"other"))
    state_dir = memory_dir / "device"

    def end_the_update() -> None:
        device = Device(state_dir, broker, server.root)
        device.receive(offer)
        assert device.version == expected, device.events
        assert (len(device.updater._slots.rejected) == 1) == (expected == 1)

    at, lived = 0, False
    while not lived:
        at += 1
        shutil.copytree(memory_dir / "installed", state_dir, symlinks=True)
        lived = run_and_kill(lambda: Device(state_dir, broker, server.root).receive(offer), at=at)

        slots = Slots(state_dir / "slots")
        assert slots.active is not None, at
        assert slots.active.manifest.version in {1, expected}, at
        assert slots.damage == [], at
        run_settled(end_the_update)
        assert Slots(state_dir / "slots").trial is None, at
        shutil.rmtree(state_dir)
    assert at > 40


def test_version_that_kills_the_agent_has_three_tries(tmp_path: Path) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(tmp_path / "server", broker)
    first = server.release(server.write_version(1, b"one"))
    run_settled(lambda: Device(tmp_path / "device", broker, server.root).receive(first))
    offer = server.release(server.write_version(2, b"two"))

    def update_to_death() -> None:
        device = Device(tmp_path / "device", broker, server.root)
        device.updater._probation._try_version = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(device.updater.start())
        asyncio.run(device.updater.handle_offer(offer))

    for tries_left in (2, 1, 0):
        assert not run_and_kill(update_to_death, at=1 << 30)
        slots = Slots(tmp_path / "device" / "slots")
        assert slots.trial is not None
        assert slots.trial.tries_left == tries_left
        assert slots.active is not None
        assert slots.active.manifest.version == 1
    device = Device(tmp_path / "device", broker, server.root)
    assert device.receive(offer) == [EventKind.FAILED]
    assert "it ended the agent 3 times; version 1 serves on" in device.last_message
    assert device.events[-1][2] == 2, "which version it was, for its rollout"
    assert device.tried == []


def test_version_on_trial_that_is_damaged_before_the_restart_is_fetched_again_and_not_rejected(tmp_path: Path) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(tmp_path / "server", broker)
    first = server.release(server.write_version(1, b"one"))
    run_settled(lambda: Device(tmp_path / "device", broker, server.root).receive(first))
    offer = server.release(server.write_version(2, b"two"))

    def update_to_death() -> None:
        device = Device(tmp_path / "device", broker, server.root)
        device.updater._probation._try_version = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        device.receive(offer)

    assert not run_and_kill(update_to_death, at=1 << 30)
    (tmp_path / "device" / "slots" / "b" / "inference.onnx").write_bytes(b"owt")
    device = Device(tmp_path / "device", broker, server.root)
    assert device.receive() == [EventKind.FAILED]
    assert device.last_message == "inference.onnx in slot b is damaged"
    assert device.receive(offer)[-1] is EventKind.UPDATED


def test_nothing_is_renamed_into_a_slot_or_over_the_state_before_it_is_synced(tmp_path: Path, monkeypatch) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(tmp_path / "server", broker)
    offer = server.release(server.write_version(1, b"one" + BIG))
    synced, renamed = set[str](), list[tuple[str, str]]()
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def note_replace(source: str | Path, target: str | Path) -> None:
        renamed.append((str(source), str(target)))
        assert str(source) in synced or "/tuf/scratch/" in str(target), f"{source} was not synced"
        if Path(target).name == "state.json":
            unsynced = [path for path in (tmp_path / "device" / "slots").glob("[ab]/*") if str(path) not in synced]
            assert [path.name for path in unsynced if path.name != "manifest.json"] == []
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    device = Device(tmp_path / "device", broker, server.root)
    assert device.receive(offer)[-1] is EventKind.UPDATED
    assert {Path(target).name for _, target in renamed} >= {
        "state.json",
        "manifest.json",
        "trusted.json",
        "coordinator.pem",
    }


def test_disk_that_takes_no_more_keeps_the_old_version_and_is_left_free(tmp_path: Path) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(tmp_path / "server", broker)
    first = server.release(server.write_version(1, b"one"))
    run_settled(lambda: Device(tmp_path / "device", broker, server.root).receive(first))
    offer = server.release(server.write_version(2, b"two" + BIG))

    def update_within_100_kb() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # chunks fit, the staged file does not
        device = Device(tmp_path / "device", broker, server.root)
        assert device.receive(offer)[-1] is EventKind.FAILED
        assert "File too large" in device.last_message
        assert device.version == 1

    assert run_and_kill(update_within_100_kb, at=1 << 30)
    assert list((tmp_path / "device" / "slots" / "b").iterdir()) == []
    device = Device(tmp_path / "device", broker, server.root)
    assert device.receive(offer)[-1] is EventKind.UPDATED


def test_kill_at_any_change_of_the_disk_leaves_the_champion_and_a_challenger_that_ends_up_beside_it(
    memory_dir: Path,
) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(memory_dir / "server", broker)
    champion, challenger = server.write_version(1, b"one"), server.write_version(2, b"two" + BIG)
    first = server.release(champion)
    run_settled(lambda: Device(memory_dir / "installed", broker, server.root).receive(first))
    before = (memory_dir / "installed" / "slots" / "state.json").read_bytes()
    offer = server.release(champion, challenger=challenger, split=Split(weight=Decimal("0.1")))
    state_dir = memory_dir / "device"

    def end_what_was_begun() -> None:
        device = Device(state_dir, broker, server.root)
        assert device.receive(offer) == [EventKind.CHALLENGER_SET], device.events
        assert (device.version, device.challenger) == (1, (2, "with weight 0.1"))

    at, lived = 0, False
    while not lived:
        at += 1
        shutil.copytree(memory_dir / "installed", state_dir, symlinks=True)
        lived = run_and_kill(lambda: Device(state_dir, broker, server.root).receive(offer), at=at)

        assert (state_dir / "slots" / "state.json").read_bytes() == before, at
        assert Slots(state_dir / "slots").damage == [], at
        run_settled(end_what_was_begun)
        held = ChallengerSlot(state_dir / "slots").held
        assert held is not None, at
        assert (held.is_proven, held.tries_left) == (True, TRIES), at
        shutil.rmtree(state_dir)
    assert at > 30


def test_challenger_that_kills_the_agent_has_three_tries_and_the_champion_serves_on(tmp_path: Path) -> None:
    broker = MemoryBroker()
    server = ReleaseServer(tmp_path / "server", broker)
    champion, challenger = server.write_version(1, b"one"), server.write_version(2, b"two")
    offer = server.release(champion, challenger=challenger, split=Split(shadow=True))

    def follow_to_death() -> None:
        device = Device(tmp_path / "device", broker, server.root)
        device.updater._challenger._serve = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        device.receive(offer)

    for tries_left in (2, 1, 0):
        assert not run_and_kill(follow_to_death, at=1 << 30)
        held = ChallengerSlot(tmp_path / "device" / "slots").held
        assert held is not None
        assert held.tries_left == tries_left
    device = Device(tmp_path / "device", broker, server.root)
    assert device.receive(offer) == [EventKind.CHALLENGER_REFUSED]
    assert device.last_message == "never tried again: it ended the agent 3 times"
    assert (device.version, device.tried) == (1, [])
