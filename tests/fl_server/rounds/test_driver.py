"""Runs driven by the real driver over a real SuperLink, with node processes."""

import os
import re
import signal
import sqlite3
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from fl_server.rounds.flower import list_nodes, register_nodes
from fl_server.rounds.rule import Aggregation
from fl_server.rounds.run import (
    build_round_dir,
    load_checkpoint,
    load_parameters,
    load_sequence,
    load_spec,
    save_cohort,
    save_sequence,
)
from models.contract.privacy import PrivacyPlan, Unit
from tests.simulators.superlink import Fleet, running_fleet, running_superlink, wait_until


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    with running_superlink(tmp_path_factory.mktemp("shared") / "superlink") as superlink:
        yield superlink


@pytest.fixture
def fleet(superlink, tmp_path):
    fleet = Fleet(superlink, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def own_fleet(tmp_path):
    """Return a fleet whose SuperLink may be killed."""
    with running_fleet(tmp_path) as fleet:
        yield fleet


def parameters_after(run_dir: Path, number: int) -> list[float]:
    return load_parameters(run_dir, load_spec(run_dir).layout, number).tolist()


def names(events) -> list[str]:
    return [event.event for event in events]


def test_three_devices_finish_every_round_of_a_run_and_of_the_next(fleet):
    devices = fleet.superlink.register("a", "b", "c")
    for device_id, behaviour in zip(devices, ("one", "two", "zero"), strict=True):
        fleet.start_node(device_id, behaviour=behaviour)
    for name in ("run-1", "run-2"):
        run_dir = fleet.create_run(devices, name=name, rounds=3)
        driver = fleet.start_driver(run_dir)
        events = driver.run_to_end()
        assert driver.wait() == 0
        assert names(events) == ["joined", "round", "round", "round", "done"]
        assert events[0].devices == ("a", "b", "c")
        assert [event.round for event in events[1:4]] == [1, 2, 3]
        assert all(event.accepted == ("a", "b", "c") and not event.missing for event in events[1:4])
        np.testing.assert_allclose(parameters_after(run_dir, 3), np.full(10, 3.0), rtol=1e-6)
        assert list(run_dir.rglob("*.f32")) == []


def test_run_with_updates_in_int8_and_the_median_is_not_moved_by_one_device(fleet):
    devices = fleet.superlink.register("one", "two", "hundred", "short")
    for name in devices:
        fleet.start_node(name, behaviour=name)
    run_dir = fleet.create_run(
        devices, rounds=1, quorum=3, uplink="int8", aggregation=Aggregation(rule="median", byzantine=1)
    )
    refused, completed = fleet.start_driver(run_dir).run_to_end()[1:3]
    assert (refused.device, completed.accepted) == ("short", ("hundred", "one", "two"))
    assert "10 bytes, expected 14" in refused.reason
    np.testing.assert_allclose(parameters_after(run_dir, 1), np.full(10, 2.0), atol=2.01 / 127)


def test_round_waits_for_the_word_continue_and_ends_at_stop(fleet):
    devices = fleet.superlink.register("a")
    fleet.start_node("a")
    run_dir = fleet.create_run(devices, rounds=3)
    driver = fleet.start_driver(run_dir)
    assert driver.next_event().event == "joined"
    assert driver.next_event().round == 1
    driver.say("continue")
    assert driver.next_event().round == 2
    driver.say("stop")
    assert driver.wait() == 0
    assert load_checkpoint(run_dir).round == 2


def test_driver_ends_when_the_coordinator_is_gone(fleet):
    devices = fleet.superlink.register("a")
    driver = fleet.start_driver(fleet.create_run(devices))
    driver.process.stdin.close()
    assert driver.wait() == 0


def test_updates_that_cannot_count_are_refused_by_name_and_the_round_goes_on(fleet):
    behaviours = {
        "nan": "NaN",
        "infinite": "infinity",
        "huge": "norm",
        "empty": "0 bytes, expected 40",
        "short": "36 bytes",
        "long": "44 bytes",
        "double": "80 bytes",
        "text": "str, expected bytes",
        "list": "list, expected bytes",
        "renamed": "['weights']",
        "extra": "['bias', 'update']",
        "counting": "['num-examples', 'update']",
        "array": "cannot be read",
        "nested": "other than one record",
        "paired": "other than one record",
    }
    devices = fleet.superlink.register("good", "zero", *behaviours)
    for device_id in devices:
        fleet.start_node(device_id, behaviour="one" if device_id == "good" else device_id, poll_s=0.5)
    run_dir = fleet.create_run(devices, rounds=1, quorum=2)
    events = fleet.start_driver(run_dir).run_to_end()
    refused = {event.device: event.reason for event in events if event.event == "update_refused"}
    assert refused.keys() == behaviours.keys()
    for device_id, words in behaviours.items():
        assert words in refused[device_id]
    completed = events[-2]
    assert completed.accepted == ("good", "zero")
    assert set(completed.missing) == set(behaviours)
    assert parameters_after(run_dir, 1) == [0.5] * 10


def test_rounds_of_the_device_unit_count_who_was_drawn_and_came_in_time_over_the_expected_cohort(fleet):
    behaviours = {"a": "one", "b": "two", "nan": "nan", "scaled": "hundred", "late": "held"}
    devices = fleet.superlink.register(*behaviours, "absent")
    for name, behaviour in behaviours.items():
        fleet.start_node(name, behaviour=behaviour)
    privacy = PrivacyPlan(
        unit=Unit.DEVICE,
        clipping_norm=Decimal(10),
        noise_multiplier=Decimal("0.00001"),
        sampling_rate=Decimal("0.5"),
        delta=Decimal("0.001"),
        epsilon=Decimal(8),
    )
    run_dir = fleet.create_run(devices, rounds=3, quorum=2, deadline_s=6, join_timeout_s=8, privacy=privacy)
    for number, cohort in ((1, tuple(behaviours)), (2, ()), (3, ("a", "late"))):
        save_cohort(run_dir, number, cohort)  # as it was drawn before a kill
    driver = fleet.start_driver(run_dir)
    events = [driver.next_event() for _ in range(4)]
    assert {event.device: event.reason for event in events[1:3]}.keys() == {"nan", "scaled"}
    assert (events[3].accepted, events[3].missing) == (("a", "b"), ("late", "nan", "scaled"))
    fleet.release("late")  # its update of round 1 comes when that is over
    driver.say("continue")
    second = driver.next_event()
    assert (second.round, second.accepted, second.missing) == (2, (), ())
    driver.say("continue")
    assert driver.next_event().accepted == ("a", "late")
    # Over half of six devices, however many came: 1 and 2, then nobody, then 1 and 1.
    np.testing.assert_allclose(parameters_after(run_dir, 1), np.full(10, 3 / 3), atol=0.01)
    np.testing.assert_allclose(parameters_after(run_dir, 2), np.full(10, 3 / 3), atol=0.01)
    np.testing.assert_allclose(parameters_after(run_dir, 3), np.full(10, 5 / 3), atol=0.01)


def test_device_that_answers_nothing_or_fails_only_costs_the_deadline(fleet):
    devices = fleet.superlink.register("good", "silent", "raise")
    nodes = {name: fleet.start_node(name, behaviour="one" if name == "good" else name) for name in devices}
    run_dir = fleet.create_run(devices, rounds=1, quorum=1, deadline_s=5)
    events = fleet.start_driver(run_dir).run_to_end()
    assert names(events) == ["joined", "round", "done"]
    assert events[1].accepted == ("good",)
    assert events[1].missing == ("raise", "silent")
    assert events[1].seconds >= 5
    assert parameters_after(run_dir, 1) == [1.0] * 10
    log = nodes["raise"].log_path.read_text()
    assert "RuntimeError" in log
    assert "0.1234" not in log


def test_round_ends_when_all_who_are_left_are_gone_and_one_that_was_thought_so_still_counts(fleet):
    devices = fleet.superlink.register("good", "silent", "held")
    nodes = {name: fleet.start_node(name, behaviour="one" if name == "good" else name) for name in devices}
    run_dir = fleet.create_run(devices, rounds=1, quorum=2, deadline_s=600)
    driver = fleet.start_driver(run_dir)
    for name, line in (("good", b"answered 1\n"), ("silent", b"silent 1\n"), ("held", b"holding 1\n")):
        assert [nodes[name].next_line(), nodes[name].next_line()] == [b"joined\n", line]
    for word in ("gone held 1", "gone silent 2", "gone stranger 1"):  # silent is waited for still
        driver.say(word)
    fleet.release("held")
    updates = build_round_dir(run_dir, 1) / "updates"
    wait_until(lambda: len(list(updates.glob("[!.]*.f32"))) == 2, what="two updates on disk")
    driver.say("gone silent 1")
    events = driver.run_to_end()
    assert names(events) == ["joined", "round", "done"]
    assert (events[1].accepted, events[1].missing) == (("good", "held"), ("silent",))
    assert parameters_after(run_dir, 1) == [1.0] * 10


def test_round_whose_devices_are_all_gone_is_tried_again_and_waits_for_them_anew(fleet):
    devices = fleet.superlink.register("a")
    node = fleet.start_node("a", behaviour="held")
    run_dir = fleet.create_run(devices, rounds=1, deadline_s=600)
    driver = fleet.start_driver(run_dir)
    assert [node.next_line(), node.next_line()] == [b"joined\n", b"holding 1\n"]
    assert driver.next_event().event == "joined"
    driver.say("gone a 1")
    assert driver.next_event().event == "abandoned"
    fleet.release("a")
    assert names(driver.run_to_end()) == ["round", "done"]
    assert node.lines.count(b"answered 1\n") == 2


@pytest.mark.parametrize("behaviour", ["oversized", "flooding"])
def test_reply_without_end_is_not_read_and_costs_nobody_else_the_round(fleet, behaviour):
    devices = fleet.superlink.register("good", "hostile", "two")
    for name in devices:
        fleet.start_node(name, behaviour={"good": "one", "hostile": behaviour}.get(name, name))
    run_dir = fleet.create_run(devices, rounds=2, quorum=2, deadline_s=60)
    driver = fleet.start_driver(run_dir)
    assert driver.next_event().event == "joined"
    refused, completed = driver.next_event(), driver.next_event()
    if completed.event != "round":
        refused, completed = completed, driver.next_event()
    assert (refused.device, completed.accepted) == ("hostile", ("good", "two"))
    assert "too long" in refused.reason
    peak_kb = int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{driver.pid}/status").read_text())[1])
    assert peak_kb < 160 * 1024  # the driver alone needs 100 MB; each copy of the reply would add 48
    driver.say("continue")
    driver.run_to_end()
    assert parameters_after(run_dir, 2) == [3.0] * 10


def test_orders_rise_even_when_the_clock_was_set_back_between_two_drivers(fleet):
    devices = fleet.superlink.register("a")
    node = fleet.start_node("a")
    run_dir = fleet.create_run(devices, rounds=2)
    ahead = int((time.time() + 86_400) * 1e6)
    save_sequence(run_dir, ahead)  # as a driver left it whose clock was a day ahead
    events = fleet.start_driver(run_dir).run_to_end()
    assert names(events) == ["joined", "round", "round", "done"]
    sequences = [int(number) for number in re.findall(r"order (\d+)", node.log_path.read_text())]
    assert ahead < sequences[0] < sequences[1] <= load_sequence(run_dir)


def test_reply_that_breaks_off_only_costs_the_deadline(fleet):
    devices = fleet.superlink.register("good", "torn")
    for name in devices:
        fleet.start_node(name, behaviour="one" if name == "good" else name)
    events = fleet.start_driver(fleet.create_run(devices, rounds=1, quorum=1, deadline_s=3)).run_to_end()
    assert names(events) == ["joined", "round", "done"]
    assert events[1].missing == ("torn",)


def test_round_without_quorum_is_abandoned_with_parameters_bit_identical(fleet):
    devices = fleet.superlink.register("good", "silent")
    for name in devices:
        fleet.start_node(name, behaviour="one" if name == "good" else name)
    run_dir = fleet.create_run(devices, rounds=2, quorum=2, deadline_s=1)
    before = (build_round_dir(run_dir, 0) / "parameters.safetensors").read_bytes()
    driver = fleet.start_driver(run_dir)
    events = driver.run_to_end()
    assert driver.wait() == 1
    assert names(events) == ["joined"] + ["abandoned"] * 4
    assert "quorum is 2" in events[-1].reason
    assert load_checkpoint(run_dir) is None
    assert (build_round_dir(run_dir, 0) / "parameters.safetensors").read_bytes() == before
    assert not (build_round_dir(run_dir, 1) / "parameters.safetensors").exists()


def test_run_begins_with_a_quorum_when_the_others_do_not_come(fleet):
    devices = fleet.superlink.register("a", "absent")
    fleet.start_node("a")
    run_dir = fleet.create_run(devices, rounds=1, quorum=1, join_timeout_s=5)
    events = fleet.start_driver(run_dir).run_to_end()
    assert events[0].devices == ("a",)
    assert events[1].missing == ("absent",)


def test_run_without_a_quorum_of_devices_ends_in_words(fleet):
    devices = fleet.superlink.register("absent")
    driver = fleet.start_driver(fleet.create_run(devices, join_timeout_s=1))
    events = driver.run_to_end()
    assert driver.wait() == 1
    assert names(events) == ["abandoned"]
    assert "0 of 1 devices are online" in events[0].reason


def test_device_killed_in_a_round_is_missed_and_rejoins_at_once(fleet):
    devices = fleet.superlink.register("a", "b")
    fleet.start_node("a")
    victim = fleet.start_node("b", behaviour="held")
    run_dir = fleet.create_run(devices, rounds=2, quorum=1, deadline_s=6)
    driver = fleet.start_driver(run_dir)
    assert victim.next_line() == b"joined\n"
    assert victim.next_line() == b"holding 1\n"
    victim.kill()
    again = fleet.start_node("b")
    assert again.next_line(timeout_s=20) == b"joined\n"
    events = driver.run_to_end()
    completed = [event for event in events if event.event == "round"]
    assert completed[0].missing == ("b",)
    assert completed[1].accepted == ("a", "b")


def test_driver_killed_in_a_round_resumes_it_and_counts_every_update_once(fleet):
    devices = fleet.superlink.register("a", "b", "late")
    quick = [
        fleet.start_node(name, behaviour=name_to_behaviour) for name, name_to_behaviour in (("a", "one"), ("b", "two"))
    ]
    late = fleet.start_node("late", behaviour="held")
    run_dir = fleet.create_run(devices, rounds=2, deadline_s=60)
    driver = fleet.start_driver(run_dir)
    updates = build_round_dir(run_dir, 1) / "updates"
    wait_until(lambda: len(list(updates.glob("[!.]*.f32"))) == 2, what="two updates on disk")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    fleet.release("late")
    again = fleet.start_driver(run_dir)
    events = again.run_to_end()
    assert again.wait() == 0
    assert names(events) == ["joined", "round", "round", "done"]
    assert [event.accepted for event in events[1:3]] == [("a", "b", "late")] * 2
    np.testing.assert_allclose(parameters_after(run_dir, 1), np.full(10, 4 / 3), rtol=1e-6)
    np.testing.assert_allclose(parameters_after(run_dir, 2), np.full(10, 8 / 3), rtol=1e-6)
    for node in quick:
        assert node.lines.count(b"answered 1\n") == 1
    assert b"answered 1\n" in late.lines


def test_last_completed_round_is_told_again_after_a_restart(fleet):
    devices = fleet.superlink.register("a")
    fleet.start_node("a")
    run_dir = fleet.create_run(devices, rounds=2)
    driver = fleet.start_driver(run_dir)
    driver.next_event()
    told = driver.next_event()
    driver.kill()
    again = fleet.start_driver(run_dir)
    assert again.next_event() == told
    again.say("continue")
    assert again.next_event().event == "joined"
    assert again.next_event().round == 2


def test_superlink_killed_in_a_round_and_restarted_lets_the_same_driver_finish(own_fleet):
    devices = own_fleet.superlink.register("a", "late")
    nodes = [own_fleet.start_node("a"), own_fleet.start_node("late", behaviour="held")]
    run_dir = own_fleet.create_run(devices, rounds=2, deadline_s=60, join_timeout_s=60)
    driver = own_fleet.start_driver(run_dir)
    updates = build_round_dir(run_dir, 1) / "updates"
    wait_until(lambda: len(list(updates.glob("[!.]*.f32"))) == 1, what="an update on disk")
    own_fleet.superlink.kill()
    own_fleet.release("late")
    own_fleet.superlink.start()
    events = driver.run_to_end(timeout_s=120)
    assert driver.wait() == 0
    completed = [event for event in events if event.event == "round"]
    assert [event.accepted for event in completed] == [("a", "late")] * 2
    assert parameters_after(run_dir, 2) == [2.0] * 10
    assert all(node.process.poll() is None for node in nodes)


def test_finished_run_leaves_no_parameters_or_updates_with_the_superlink(own_fleet):
    devices = own_fleet.superlink.register("a", "b")
    own_fleet.start_node("a")
    own_fleet.start_node("b", behaviour="silent")
    events = own_fleet.start_driver(own_fleet.create_run(devices, rounds=1, quorum=1, deadline_s=2)).run_to_end()
    assert names(events) == ["joined", "round", "done"]
    with closing(sqlite3.connect(own_fleet.superlink.directory / "flwr.db")) as database:
        assert database.execute("SELECT count(*) FROM objects").fetchone() == (0,)


def test_driver_gives_up_when_the_superlink_stays_away(own_fleet):
    devices = own_fleet.superlink.register("a")
    run_dir = own_fleet.create_run(devices, join_timeout_s=1)
    own_fleet.superlink.kill()
    driver = own_fleet.start_driver(run_dir)
    assert driver.run_to_end() == []
    assert driver.wait() == 1
    assert "no run could be opened" in driver.log_path.read_text().splitlines()[-1]


def test_two_drivers_do_not_claim_each_others_run(fleet):
    devices = fleet.superlink.register("a", "b")
    for name in devices:
        fleet.start_node(name)
    run_dirs = [fleet.create_run({name: devices[name]}, name=f"run-{name}", rounds=1) for name in devices]
    drivers = [fleet.start_driver(run_dir) for run_dir in run_dirs]
    for driver in drivers:
        assert names(driver.run_to_end()) == ["joined", "round", "done"]


def test_registering_again_gives_the_same_node_ids(superlink):
    keys = {name: superlink.create_key(name) for name in ("a", "b")}
    first = register_nodes(superlink.address, superlink.ca_path, {"a": keys["a"]})
    both = register_nodes(superlink.address, superlink.ca_path, keys)
    assert both["a"] == first["a"]
    assert register_nodes(superlink.address, superlink.ca_path, keys) == both
    assert set(both.values()) <= set(list_nodes(superlink.address, superlink.ca_path).values())
