import os
import signal
import time
from dataclasses import replace

import pytest

from fl_server.fleet import roster as module
from fl_server.fleet.roster import CERTIFICATES_MAX, Roster, RosterError
from models.contract.messages import Event, EventKind, Status, Telemetry


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "coordinator.db") as roster:
        yield roster


def enroll(roster: Roster, *device_ids: str) -> None:
    for device_id in device_ids:
        with roster.enrolling(device_id, b"key of " + device_id.encode()):
            pass


def build_status(**changed) -> Status:
    return Status(**{"sent_at": 1.0, "online": True, "agent": "0.1", "model": "digits", "trains": True, **changed})


def build_event(event_id: str) -> Event:
    return Event(id=event_id, sent_at=1.0, kind=EventKind.UPDATED, message="version 2 is active")


def test_device_is_enrolled_once(roster):
    enroll(roster, "device-1")
    with pytest.raises(RosterError, match="enrolled already"):
        enroll(roster, "device-1")
    assert [device.device_id for device in roster.list_devices()] == ["device-1"]


def test_failed_enrolment_leaves_no_device(roster):
    with pytest.raises(OSError, match="full"), roster.enrolling("device-1", b"key"):
        raise OSError("disk full")
    assert roster.list_devices() == []
    enroll(roster, "device-1")


def test_node_id_of_64_unsigned_bits_comes_back(roster):
    enroll(roster, "device-1")
    roster.save_node_id("device-1", 2**64 - 1)
    assert roster.list_devices()[0].node_id == 2**64 - 1


def test_device_may_train_only_while_it_is_online_trains_and_is_not_revoked(roster):
    enroll(roster, "device-1")
    assert not roster.list_devices()[0].may_train
    roster.save_status("device-1", build_status())
    assert roster.list_devices()[0].may_train
    roster.save_status("device-1", build_status(online=False))
    assert not roster.list_devices()[0].may_train
    roster.save_status("device-1", build_status(trains=False))
    assert not roster.list_devices()[0].may_train
    roster.save_status("device-1", build_status())
    roster.revoke("device-1")
    assert not roster.list_devices()[0].may_train
    assert not roster.is_member("device-1")


def test_revoking_a_stranger_is_refused(roster):
    with pytest.raises(RosterError, match="not enrolled"):
        roster.revoke("device-1")


def test_event_delivered_twice_is_kept_once_and_ids_belong_to_their_device(roster):
    enroll(roster, "device-1", "device-2")
    assert roster.save_event("device-1", build_event("a"))
    assert not roster.save_event("device-1", build_event("a"))
    assert roster.save_event("device-2", build_event("a"))
    assert [event.id for event in roster.list_events("device-1")] == ["a"]


def test_only_the_newest_events_of_a_device_are_kept(roster, monkeypatch):
    monkeypatch.setattr(module, "EVENTS_KEPT", 3)
    enroll(roster, "device-1", "device-2")
    roster.save_event("device-2", build_event("other"))
    for number in range(5):
        roster.save_event("device-1", build_event(str(number)))
    assert [event.id for event in roster.list_events("device-1")] == ["2", "3", "4"]
    assert len(roster.list_events("device-2")) == 1


def say(roster: Roster, device_id: str, kind: EventKind, *, version: int | None, model: str = "digits") -> None:
    event = build_event(f"{roster.find_last_event()} of {device_id}")
    roster.save_event(device_id, replace(event, kind=kind, model=model, version=version))


def find_failed(roster: Roster, *, since: int = 0) -> dict[str, bool]:
    return {word.device_id: word.has_failed for word in roster.list_last_words("digits", 2, since=since)}


def test_last_word_of_each_member_on_a_version_counts_once_and_only_as_news(roster, monkeypatch):
    enroll(roster, "device-1", "device-2", "device-3")
    failed = replace(build_event("f"), kind=EventKind.FAILED, model="digits", version=2, message="it is too slow")
    assert roster.save_event("device-1", failed)
    assert [word.message for word in roster.list_last_words("digits", 2)] == ["it is too slow"]
    say(roster, "device-1", EventKind.UPDATED, version=2)
    assert not roster.save_event("device-1", failed), "as a repeated delivery is not"
    say(roster, "device-2", EventKind.UPDATED, version=2)
    say(roster, "device-2", EventKind.FAILED, version=2)
    say(roster, "device-2", EventKind.DOWNLOADED, version=2)
    say(roster, "device-3", EventKind.FAILED, version=3)
    say(roster, "device-3", EventKind.FAILED, version=2, model="other")
    for version in (None, 0):
        say(roster, "device-3", EventKind.FAILED, version=version)
    assert find_failed(roster) == {"device-1": False, "device-2": True}
    since = roster.find_last_event()
    assert find_failed(roster, since=since) == {}
    say(roster, "device-1", EventKind.FAILED, version=2)
    assert find_failed(roster, since=since) == {"device-1": True}
    roster.revoke("device-1")
    assert find_failed(roster) == {"device-2": True}
    monkeypatch.setattr(module, "WORDS_KEPT", 3)
    for version in range(10, 15):
        say(roster, "device-2", EventKind.UPDATED, version=version)
    kept = [version for version in range(1, 20) if roster.list_last_words("digits", version)]
    assert kept == [3, 12, 13, 14], "3 is another device's"


def test_event_is_on_disk_before_it_can_be_acknowledged(tmp_path):
    path = tmp_path / "coordinator.db"
    with Roster(path) as roster:
        enroll(roster, "device-1")
    child = os.fork()
    if child == 0:
        with Roster(path) as roster:
            roster.save_event("device-1", build_event("a"))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with Roster(path) as roster:
        assert [event.id for event in roster.list_events("device-1")] == ["a"]


def test_telemetry_keeps_the_last_value(roster):
    enroll(roster, "device-1")
    for uptime_s in (1.0, 2.0):
        roster.save_telemetry(
            "device-1", Telemetry(id=str(uptime_s), sent_at=1.0, uptime_s=uptime_s, rss_mb=60.0, model="digits")
        )
    assert roster.list_devices()[0].telemetry.uptime_s == 2.0


def test_device_that_asks_for_certificates_without_end_gets_no_more(roster):
    enroll(roster, "device-1")
    ends = time.time() + 3600
    for serial in range(CERTIFICATES_MAX):
        roster.save_certificate("device-1", serial, ends)
    with pytest.raises(RosterError, match="no more are issued"):
        roster.save_certificate("device-1", CERTIFICATES_MAX, ends)
