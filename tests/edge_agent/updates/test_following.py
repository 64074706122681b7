"""Which release a device follows: by waves and requirements, decided from what is signed, before anything is fetched."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.errors import UnfitError
from edge_agent.updates.following import Release, choose_release
from models.contract.encoding import build_digest
from models.contract.manifest import FileEntry
from models.contract.messages import EventKind
from models.contract.terms import ReleaseTerms, Role, Split
from models.contract.wave import Requirements, Wave
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import BIG, DEVICE, TRAITS, Device, ReleaseServer

NOBODY, EVERYBODY = (Wave(key="r", percentage=Decimal(share)) for share in (0, 100))
LISTED = replace(NOBODY, devices=(DEVICE,))
OTHERS = Requirements(hardware=("armv7l",))
NEW, OLD, OLDER = "2" * 64, "1" * 64, "0" * 64


def release(role: Role, digest: str, *, wave: Wave | None = None, asked: Requirements | None = None) -> Release:
    terms = ReleaseTerms(role=role, version=1, wave=wave, requirements=asked or Requirements())
    return Release(entry=FileEntry(digest=digest, size_bytes=1), terms=terms)


@pytest.mark.parametrize(
    ("wave", "active", "follows"),
    [
        (None, OLD, NEW),
        (EVERYBODY, OLD, NEW),
        (LISTED, OLD, NEW),
        (NOBODY, OLD, OLD),
        (NOBODY, NEW, NEW),  # a wave never takes back what a device has
        (NOBODY, OLDER, OLD),
        (NOBODY, None, OLD),
    ],
)
def test_device_in_the_wave_follows_the_champion_and_any_other_keeps_what_it_has_or_takes_the_previous_one(
    wave: Wave | None, active: str | None, follows: str
) -> None:
    releases = {"champion": release("champion", NEW, wave=wave), "previous": release("previous", OLD)}
    chosen = choose_release(releases.get, device_id=DEVICE, traits=TRAITS, active=active)
    assert chosen is not None
    assert chosen.entry.digest == follows


def test_device_outside_the_first_wave_of_a_fleet_stays_with_nothing() -> None:
    releases = {"champion": release("champion", NEW, wave=NOBODY)}
    assert choose_release(releases.get, device_id=DEVICE, traits=TRAITS, active=None) is None


@pytest.mark.parametrize("role", ["champion", "previous"])
def test_release_for_other_devices_is_refused_unless_it_runs_already(role: Role) -> None:
    releases = {role: release(role, NEW, asked=OTHERS)}
    releases.setdefault("champion", release("champion", OLD, wave=NOBODY))
    with pytest.raises(UnfitError, match="it is for hardware armv7l, this is x86_64"):
        choose_release(releases.get, device_id=DEVICE, traits=TRAITS, active=None)
    assert choose_release(releases.get, device_id=DEVICE, traits=TRAITS, active=NEW) is releases[role]


def test_device_outside_the_wave_is_not_asked_what_it_is() -> None:
    releases = {
        "champion": release("champion", NEW, wave=NOBODY, asked=OTHERS),
        "previous": release("previous", OLD),
    }
    assert choose_release(releases.get, device_id=DEVICE, traits=TRAITS, active=OLD) is releases["previous"]


@pytest.fixture
def device(tmp_path: Path, broker: MemoryBroker, server: ReleaseServer) -> Device:
    """A device on version 1."""
    device = Device(tmp_path / "device", broker, server.root)
    device.receive(server.release(server.write_version(1, b"one")))
    device.events.clear()
    broker.reads.clear()
    return device


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (OTHERS, "it is for hardware armv7l, this is x86_64"),
        (Requirements(agent="1.10"), "it needs agent 1.10 or later, this is 1.2.0"),
        (Requirements(regions=("south",)), "it is for region south, this is in north"),
    ],
)
def test_release_for_other_devices_is_told_once_and_nothing_of_it_is_fetched(
    broker: MemoryBroker, server: ReleaseServer, device: Device, asked: Requirements, said: str
) -> None:
    second = server.write_version(2, b"two" + BIG)
    offers = [server.release_with({second: ReleaseTerms(role="champion", version=2, requirements=asked)})]
    server.repository.renew(("timestamp",), now=server.now)
    offers.append(server.publish(second))
    device.receive(*offers)
    assert device.events == [(EventKind.FAILED, f"version 2 is not for this device: {said}", 2)]
    assert broker.reads == []
    assert (device.version, device.serving) == (1, b"one")


def test_version_for_a_runtime_that_is_not_here_is_refused_by_its_manifest_alone(
    broker: MemoryBroker, server: ReleaseServer, tmp_path: Path
) -> None:
    device = Device(tmp_path / "device", broker, server.root, traits=replace(TRAITS, runtimes=("tflite",)))
    offer = server.release(server.write_version(1, b"one" + BIG))
    device.receive(offer, offer)
    said = "version 1 is not for this device: it is for onnx, installed here is tflite"
    assert device.events == [(EventKind.FAILED, said, 1)]
    assert not any(build_digest(b"one" + BIG) in topic for topic in broker.reads)


def test_challenger_for_other_devices_is_refused_alike(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    champion, rival = server.directory.path / "versions" / "digits" / "1", server.write_version(2, b"two" + BIG)
    offer = server.release_with(
        {
            champion: ReleaseTerms(role="champion", version=1),
            rival: ReleaseTerms(role="challenger", version=2, split=Split(), requirements=OTHERS),
        }
    )
    device.receive(offer, offer)
    said = "version 2 is not for this device: it is for hardware armv7l, this is x86_64"
    assert device.events == [(EventKind.CHALLENGER_REFUSED, said, 2)]
    assert broker.reads == []


def test_wave_that_grows_brings_the_device_over_and_one_that_is_taken_back_brings_it_home(
    broker: MemoryBroker, server: ReleaseServer, device: Device
) -> None:
    first, second = server.directory.path / "versions" / "digits" / "1", server.write_version(2, b"two" + BIG)
    for wave, version in ((NOBODY, 1), (LISTED, 2), (NOBODY, 2), (EVERYBODY, 2)):
        terms = {
            first: ReleaseTerms(role="previous", version=1),
            second: ReleaseTerms(role="champion", version=2, wave=wave),
        }
        device.receive(server.release_with(terms))
        assert device.version == version
    broker.reads.clear()
    device.receive(server.release_with({first: ReleaseTerms(role="champion", version=1)}))
    assert (device.version, broker.reads) == (1, [])
