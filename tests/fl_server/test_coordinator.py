import dataclasses
import itertools
import json
import os
import shutil
import signal
import sqlite3
import time

import paho.mqtt.client
import paho.mqtt.publish
import paho.mqtt.subscribe
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from safetensors.numpy import load_file

from fl_server.directory import Directory
from fl_server.fleet.roster import Roster
from fl_server.jobs import Jobs, JobState
from fl_server.registry.registry import Registry
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rounds.flower import list_nodes
from models.contract.encoding import build_json
from models.contract.envelope import RunNotice, WakeCommand, open_envelope
from models.contract.ledger import LedgerHead, Spent
from models.contract.manifest import build_manifest, parse_manifest
from models.contract.messages import Event, EventKind, Status
from models.contract.offer import parse_offer
from tests.simulators.federation import BIAS, FLEET, MODEL, Federation
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.waiting import wait_until

EVENT = Event(id="event-1", sent_at=1.0, kind=EventKind.UPDATED, message="version 2 is active")


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture
def federation(tmp_path, template, broker):
    with Federation(tmp_path / "federation", template, broker_port=broker.port) as federation:
        yield federation


def publish(broker: Mosquitto, topic: str, payload: bytes) -> None:
    protocol = paho.mqtt.client.MQTTv5
    paho.mqtt.publish.single(topic, payload, qos=1, port=broker.port, protocol=protocol)


def read_retained(broker: Mosquitto, topic: str) -> bytes:
    """Return what is retained under `topic`, which must come to be."""
    return bytes(paho.mqtt.subscribe.simple(topic, port=broker.port).payload)


def wait_for_job(federation: Federation, job: int):
    with Jobs(federation.directory / "coordinator.db") as jobs:
        wait_until(lambda: jobs.get(job).is_over, f"the end of job {job}", timeout_s=90)
        return jobs.get(job)


def open_signed(federation: Federation, data: bytes, kind: type, audience: str):
    key = load_pem_private_key((federation.directory / "keys/online/orders.pem").read_bytes(), None).public_key()
    return open_envelope(data, kind, key=key, fleet=FLEET, audience=audience, now_s=time.time())


def test_end_leaves_no_child_behind(federation):
    federation.start()
    federation.wait_for_log("started superlink")
    children = federation.find_children()
    assert children
    assert federation.stop() == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_killed_coordinator_takes_its_superlink_with_it_and_starts_again(federation):
    federation.start()
    federation.wait_for_log("started superlink")
    [superlink] = federation.find_children()
    federation.kill()
    wait_until(lambda: not superlink.is_running(), "the end of the SuperLink")
    federation.start()
    done = federation.command("release", str(federation.directory / "v1"))
    assert done.returncode == 0, done.stderr
    [other] = federation.find_children()
    assert other.pid != superlink.pid


def test_superlink_that_dies_is_started_again(federation):
    federation.start()
    federation.wait_for_log("started superlink")
    [superlink] = federation.find_children()
    superlink.kill()
    federation.wait_for_log("superlink is started again")
    wait_until(
        lambda: [child for child in federation.find_children() if child.pid != superlink.pid], "another SuperLink"
    )


def test_second_coordinator_in_one_directory_is_refused(federation):
    federation.start()
    federation.wait_for_log("started superlink")
    done = federation.command("run")
    assert done.returncode == 1
    assert "running" in done.stderr
    assert done.stderr.count("\n") == 1


def test_released_version_is_offered_and_offered_again_after_the_broker_lost_it(federation, broker):
    federation.start()
    done = federation.command("release", str(federation.directory / "v1"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    manifest_digest = json.loads(done.stdout)["digest"]
    topics = [f"fl/v1/{FLEET}/offer", f"fl/v1/{FLEET}/blob/{manifest_digest}/0"]
    before = [read_retained(broker, topic) for topic in topics]
    assert f"releases/{MODEL}/champion/manifest.json" in str(parse_offer(before[0]))
    assert parse_manifest(before[1]).version == 1
    broker.restart()
    assert [read_retained(broker, topic) for topic in topics] == before


def write_second_version(federation: Federation) -> str:
    """Return the folder of the first version under the next number."""
    shutil.copytree(federation.directory / "v1", directory := federation.directory / "v2")
    manifest = parse_manifest((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_bytes(build_manifest(dataclasses.replace(manifest, version=2)))
    return str(directory)


def read_roles(broker: Mosquitto) -> dict[str, dict]:
    """Return the terms of what the retained offer signs, by role."""
    files = parse_offer(read_retained(broker, f"fl/v1/{FLEET}/offer"))
    [releases] = [json.loads(data) for name, data in files.items() if name.endswith(".releases.json")]
    terms = [target["custom"] for target in releases["signed"]["targets"].values() if "custom" in target]
    return {each["role"]: each for each in terms}


def test_challenger_is_offered_with_its_split_and_promoted_rolled_back_or_withdrawn(federation, broker):
    federation.start()
    federation.wait_for_log("connected to the broker")  # a command before that says that its job waits
    second = write_second_version(federation)
    challenge = ("release", second, "--challenger", "--weight", "0.10")
    done = federation.command(*challenge)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "sides has no champion" in done.stderr
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    done = federation.command(*challenge)
    assert done.stdout == "sides version 2 is the challenger, with weight 0.10; the fleet is told\n", done.stderr
    assert read_roles(broker)["challenger"]["split"] == {"weight": "0.10", "shadow": False}
    assert read_roles(broker)["champion"]["version"] == 1
    done = federation.command("release", "--promote", "sides")
    assert done.stdout == "sides version 2 is the champion; the fleet is told\n", done.stderr
    roles = read_roles(broker)
    assert {role: terms["version"] for role, terms in roles.items()} == {"champion": 2, "previous": 1}
    done = federation.command(*challenge)
    assert "version 2 cannot challenge version 2: it is the champion itself" in done.stderr
    done = federation.command("rollback", "sides")
    assert done.stdout == "sides version 1 is the champion; the fleet is told\n", done.stderr
    roles = read_roles(broker)
    assert {role: terms["version"] for role, terms in roles.items()} == {"champion": 1, "previous": 2}
    assert federation.command("release", second, "--challenger", "--shadow").returncode == 0
    assert read_roles(broker)["challenger"]["split"]["shadow"] is True
    assert federation.command("release", "--withdraw", "sides").stdout.startswith("sides version 2 is no challenger")
    assert "challenger" not in read_roles(broker)


PLAN = """\
waves = [0, 50.5, 100]
[abortConfig]
criteriaList = [{ thresholdPercentage = 50, minNumberOfExecutedThings = 1 }]
"""


def test_rollout_is_steered_by_commands_and_goes_on_after_a_restart_until_its_canary_fails(federation, broker):
    federation.start()
    federation.wait_for_log("connected to the broker")
    canary = federation.add_device("canary")
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    second, plan_path = write_second_version(federation), federation.directory / "plan.toml"
    plan_path.write_text(PLAN)
    done = federation.command("rollout", "start", second, "--plan", str(plan_path), "--devices", "canary")
    assert done.stdout == (
        "sides version 2, after 1: rolling, wave 1 of 3, 0 of 0 %; 0 devices run it, on 0 it failed\n"
        "  the next wave, 50.5 %: fl-server rollout approve sides\nthe fleet is told\n"
    ), done.stderr
    wave = read_roles(broker)["champion"]["wave"]
    assert (wave["percentage"], wave["devices"]) == ("0", ["canary"])
    done = federation.command("release", second)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the rollout of sides version 2 is rolling at 0 %" in done.stderr
    federation.kill()
    federation.start()
    federation.wait_for_log("connected to the broker")
    assert read_roles(broker)["champion"]["wave"] == wave
    status = json.loads(federation.command("rollout", "approve", "sides", "--json").stdout)
    assert (status["phase"], status["percentage"], status["awaits_approval"]) == ("rolling", "50.5", True)
    assert read_roles(broker)["champion"]["wave"] == {**wave, "percentage": "50.5"}
    canary.say(dataclasses.replace(EVENT, kind=EventKind.FAILED, model=MODEL, version=2, message="it is too slow"))
    federation.wait_for_log("the fleet goes back to version 1: 1 of 1 devices failed")
    wait_until(lambda: read_roles(broker)["champion"]["version"] == 1, "the offer of the version before")
    assert read_roles(broker).keys() == {"champion"}
    done = federation.command("rollout", "status", "sides")
    assert "rolled back: 1 of 1 devices failed, 50 % of at least 1 end it\n  canary: it is too slow\n" in done.stdout
    done = federation.command("rollout", "resume", "sides")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_events_are_acknowledged_each_time_and_kept_once_amid_junk_and_strangers(federation, broker):
    federation.start()
    federation.wait_for_log("connected to the broker")
    device = federation.add_device("device-1")
    prefix = f"fl/v1/{FLEET}/device"
    for channel in ("status", "telemetry", "event"):
        for junk in (b"", b"{", b"\xff", b"null", b"[" * 5000, bytes(20_000)):
            publish(broker, f"{prefix}/device-1/{channel}", junk)
    publish(broker, f"{prefix}/stranger/event", build_json(EVENT))
    publish(broker, f"{prefix}/stranger/status", build_json(Status(sent_at=1, online=True, agent="1", model=MODEL)))
    for repetition in (1, 2):
        device.say(EVENT)
        wait_until(lambda: len(device.acknowledged) == repetition, "an acknowledgement")  # noqa: B023
    assert device.acknowledged == ["event-1", "event-1"]
    with Roster(federation.directory / "coordinator.db") as roster:
        assert roster.list_events("device-1") == [EVENT]
        assert roster.list_events("stranger") == []
        assert [found.device_id for found in roster.list_devices()] == ["device-1"]
        assert roster.list_devices()[0].status.online


def test_jobs_that_cannot_be_done_fail_with_one_line(federation):
    federation.start()
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    done = federation.command("train", MODEL)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no device" in done.stderr
    (federation.directory / "v1" / "evaluate.onnx").write_bytes(b"tampered")
    with sqlite3.connect(federation.directory / "registry" / "index.db") as index:
        index.execute("DELETE FROM aliases")
        index.execute("DELETE FROM versions")
    done = federation.command("release", str(federation.directory / "v1"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "digest" in done.stderr


def test_graphs_cannot_be_released_where_their_key_is_not(federation):
    (federation.directory / "keys/offline/graphs.pem").unlink()
    federation.start()
    done = federation.command("release", str(federation.directory / "v1"))
    assert (done.returncode, done.stderr.splitlines()[-1].count("--keys")) == (1, 1)
    with Registry(federation.directory / "registry") as registry:
        assert registry.search_registered_models() in ([], [MODEL])


def test_run_trains_in_rounds_and_releases_what_is_better(federation, broker):
    federation.start()
    devices = [federation.add_device(f"device-{number}", fraction=0.7) for number in (1, 2)]
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    done = federation.command("train", MODEL, "--rounds", "2", "--epsilon", "8", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [outcome["accepted"] for outcome in result["rounds"]] == [["device-1", "device-2"]] * 2
    assert [outcome["promoted"] for outcome in result["rounds"]] == [True, False]
    assert 0 < float(result["rounds"][0]["epsilon"]) < float(result["epsilon"]) <= 8
    with Registry(federation.directory / "registry") as registry:
        champion = registry.get_model_version_by_alias(MODEL, "champion")
        manifest = champion.load_manifest()
        assert (champion.version, champion.run, champion.round) == (2, result["run"], 1)
        assert registry.get_model_version_by_alias(MODEL, "previous").version == 1
    assert manifest.lineage.parent_version == 1
    assert manifest.training.local == ("bias",)
    assert (load_file(champion.directory / "parameters.safetensors")["bias"] == BIAS).all()
    assert (champion.directory / "local.f32").read_bytes() == BIAS.tobytes()
    held = list((federation.directory / "runs").rglob("rounds/*/parameters.safetensors"))
    assert [set(load_file(path)) for path in held] == [{"weight"}] * 3
    assert manifest.privacy.expected_cohort == 2
    assert str(manifest.privacy.epsilon) == result["rounds"][0]["epsilon"]
    offer = parse_offer(read_retained(broker, f"fl/v1/{FLEET}/offer"))
    assert champion.manifest_digest in str(offer)
    notice = open_signed(federation, read_retained(broker, f"fl/v1/{FLEET}/run/{MODEL}"), RunNotice, "device-1")
    assert (notice.state, notice.run) == ("closed", result["run"])
    for device in devices:
        command = open_signed(federation, device.received[0][1], WakeCommand, device.device_id)
        assert (command.run, command.ledger) == (result["run"], LedgerHead())
        assert command.expires_at - command.issued_at <= 60
        assert command.poll_interval_ms >= 200
    # What device-1 says that its first round cost arrives late; of device-2 there is no word at all.
    plan = notice.privacy
    kind = Spent(
        model=MODEL,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        steps=notice.training.steps,
    )
    other = dataclasses.replace(kind, model="another", steps=5)
    said = LedgerHead(entries=2, digest="e" * 64, spent=(other, kind))
    spent = Event(id="spent", sent_at=1, kind=EventKind.PRIVACY_SPENT, message="", run=notice.run, round=1, ledger=said)
    devices[0].say(spent)
    wait_until(lambda: "spent" in devices[0].acknowledged, "an acknowledgement")
    known = [len(device.commands) for device in devices]
    second = federation.command("train", MODEL, "--rounds", "1", "--epsilon", "4", "--json")
    assert second.returncode == 0, second.stderr
    copies = [
        open_signed(federation, device.commands[number], WakeCommand, device.device_id).ledger
        for device, number in zip(devices, known, strict=True)
    ]
    both_rounds = dataclasses.replace(kind, steps=2 * kind.steps)
    assert copies == [dataclasses.replace(said, spent=(other, both_rounds)), LedgerHead(spent=(both_rounds,))]
    # The same records may be in both runs, and who sees updates saw those of the round that released nothing.
    assert float(result["epsilon"]) + 0.5 < float(json.loads(second.stdout)["epsilon"]) <= float(result["epsilon"]) + 4


def test_run_of_the_device_unit_releases_its_statement_and_charges_each_device_once(federation):
    federation.start()
    devices = [federation.add_device(f"device-{number}", fraction=0.7) for number in (1, 2)]
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    # At a rate of 1 all are drawn; the teachers' updates are 3.96 long, and then shorter.
    plan = ("--unit", "device", "--sampling-rate", "1", "--clipping-norm", "4", "--epsilon", "50", "--delta", "0.4")
    done = federation.command("train", MODEL, "--rounds", "2", *plan, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [outcome["accepted"] for outcome in result["rounds"]] == [["device-1", "device-2"]] * 2
    with Registry(federation.directory / "registry") as registry:
        statement = registry.get_model_version_by_alias(MODEL, "champion").load_manifest().privacy
    assert (statement.unit, statement.expected_cohort) == ("device", 2)
    assert "PLD" in statement.accountant
    assert "nobody but the coordinator sees which devices took part" in statement.trust_model
    assert str(statement.epsilon) in {outcome["epsilon"] for outcome in result["rounds"]}
    refused = federation.command("train", MODEL, "--rounds", "1")
    assert refused.returncode == 1
    assert "the privacy unit device" in refused.stderr
    with Roster(federation.directory / "coordinator.db") as roster:
        for device in devices:
            [spent] = roster.get_ledger(device.device_id).spent
            assert (spent.sampling_rate, spent.steps) == (1, 2)


def test_run_goes_on_after_a_kill_of_the_coordinator_and_no_round_is_released_twice(federation):
    federation.start()
    device = federation.add_device("device-1", fraction=0.3)
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    assert federation.command("train", MODEL, "--rounds", "4", "--no-wait").returncode == 0
    for killed_after in ("round 1/4", "round 2/4"):
        federation.wait_for_log(killed_after)
        federation.kill()
        federation.start()
    job = wait_for_job(federation, 2)
    assert job.state is JobState.DONE, job.result
    result = json.loads(job.result)
    assert [outcome["round"] for outcome in result["rounds"]] == [1, 2, 3, 4]
    assert all(outcome["accepted"] == ["device-1"] for outcome in result["rounds"])
    with Registry(federation.directory / "registry") as registry:
        made = [(version.run, version.round) for version in registry.search_model_versions(MODEL)[1:]]
    assert len(made) == len(set(made))
    assert [round_ for _, round_ in made] == [o["round"] for o in result["rounds"] if o["promoted"]]
    assert {command["run"] for command in device.wakes} == {result["run"]}
    floors = ReleaseRepository(Directory(federation.directory)).build_floors()
    told = [command["floors"]["roles"]["timestamp"] for command in device.wakes]
    assert {floor["keys"] for floor in told} == {floors.roles["timestamp"].keys}
    assert sorted(told, key=lambda floor: floor["version"]) == told
    assert 1 < told[-1]["version"] <= floors.roles["timestamp"].version


def test_killed_driver_is_started_again_and_missing_devices_are_woken_again(federation):
    federation.start()
    device = federation.add_device("device-1", fraction=0.3)
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    assert federation.command("train", MODEL, "--rounds", "3", "--no-wait").returncode == 0
    federation.wait_for_log("1 of 1 devices joined")
    [driver] = [child for child in federation.find_children() if "fl_server.rounds" in child.cmdline()]
    os.kill(driver.pid, signal.SIGKILL)
    device.kill_teacher()
    assert wait_for_job(federation, 2).state is JobState.DONE
    assert len(device.wakes) > 1


def test_run_survives_kills_of_the_superlink_and_of_the_broker(federation, broker):
    federation.start()
    device = federation.add_device("device-1", fraction=0.3)
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    assert federation.command("train", MODEL, "--rounds", "4", "--no-wait").returncode == 0
    federation.wait_for_log("round 1/4")
    [superlink] = [child for child in federation.find_children() if "fl_server.rounds" not in child.cmdline()]
    superlink.kill()
    broker.restart()
    notice = open_signed(federation, read_retained(broker, f"fl/v1/{FLEET}/run/{MODEL}"), RunNotice, "device-1")
    job = wait_for_job(federation, 2)
    assert job.state is JobState.DONE, job.result
    result = json.loads(job.result)
    assert notice.run == result["run"]
    assert [outcome["accepted"] for outcome in result["rounds"]] == [["device-1"]] * 4
    assert device.wakes


def test_device_that_refuses_is_woken_once_a_round(federation):
    federation.environment |= {"FL_SERVER_ROUNDS__JOIN_TIMEOUT_S": "3"}
    federation.start()
    willing, refusing = [federation.add_device(f"device-{number}", fraction=0.3) for number in (1, 2)]
    refusing.excuses = itertools.repeat(EventKind.TRAINING_REFUSED)
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    done = federation.command("train", MODEL, "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert [outcome["missing"] for outcome in json.loads(done.stdout)["rounds"]] == [["device-2"]] * 2
    assert "device-2: not this time" in done.stderr
    assert willing.wakes
    assert len(refusing.wakes) <= 4  # when the run begins, when it has joined, and after each round


def test_round_does_not_wait_for_a_device_that_says_that_it_refuses_or_for_one_that_the_broker_lost(federation):
    """Neither would ever reply, and the deadline is ten minutes away."""
    federation.environment |= {"FL_SERVER_ROUNDS__DEADLINE_S": "600", "FL_SERVER_ROUNDS__QUORUM": "0.3"}
    federation.environment |= {"FL_SERVER_ROUNDS__OFFLINE_GRACE_S": "5"}
    federation.start()
    federation.add_device("device-1", fraction=0.3)
    refusing, lost = [federation.add_device(f"device-{number}", fraction="silent") for number in (2, 3)]
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    plan = ("--unit", "device", "--sampling-rate", "1", "--clipping-norm", "4", "--epsilon", "50", "--delta", "0.3")
    assert federation.command("train", MODEL, "--rounds", "1", *plan, "--no-wait").returncode == 0
    federation.wait_for_log("3 of 3 devices joined")
    lost.say_online(online=False)
    run = refusing.wakes[0]["run"]
    refusals = (f"refused-{number}" for number in itertools.count())
    with Jobs(federation.directory / "coordinator.db") as jobs:

        def refuse_until_it_is_over():  # what is said before the order left is not about it
            event = Event(id=next(refusals), sent_at=1, kind=EventKind.TRAINING_REFUSED, message="no", run=run, round=1)
            refusing.say(event)
            return jobs.get(2).is_over

        wait_until(refuse_until_it_is_over, "the end of the run", timeout_s=90)
        result = json.loads(jobs.get(2).result)
    [outcome] = result["rounds"]
    assert (outcome["accepted"], outcome["missing"]) == (["device-1"], ["device-2", "device-3"])


def test_device_whose_training_process_ended_is_woken_at_once(federation):
    federation.start()
    device = federation.add_device("device-1", fraction=0.3)
    device.excuses = iter([EventKind.TRAINING_ENDED])
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    done = federation.command("train", MODEL, "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert len(device.wakes) >= 2


def test_revoked_device_is_no_node_any_more_and_the_others_stay(federation):
    federation.start()
    for number in (1, 2):
        federation.add_device(f"device-{number}")
    federation.wait_for_log("device-2 is node")
    assert federation.command("revoke", "device-1").returncode == 0
    federation.wait_for_log("device-1 is revoked and node")
    address, ca_path = f"127.0.0.1:{federation.superlink_port}", federation.directory / "ca" / "ca.pem"
    with Roster(federation.directory / "coordinator.db") as roster:
        revoked, member = roster.list_devices()
    assert list(list_nodes(address, ca_path).values()) == [member.node_id]
    assert revoked.node_id is None


def test_damaged_version_and_database_are_logged_and_the_coordinator_goes_on(federation, broker):
    federation.start()
    device = federation.add_device("device-1")
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
    manifest_path = federation.directory / "registry" / "versions" / MODEL / "1" / "manifest.json"
    manifest = manifest_path.read_bytes()
    manifest_path.write_bytes(b"damaged")
    broker.restart()
    federation.wait_for_log("stays as it was signed")
    assert read_roles(broker)["champion"]["version"] == 1, "others' metadata must not expire"
    with sqlite3.connect(federation.directory / "coordinator.db") as database:
        database.execute("ALTER TABLE events RENAME TO mislaid")
        database.execute("ALTER TABLE jobs RENAME TO undone")
    device.say(EVENT)
    federation.wait_for_log("what device-1 says could not be kept")
    federation.wait_for_log("jobs wait for their database")
    assert device.acknowledged == []
    with sqlite3.connect(federation.directory / "coordinator.db") as database:
        database.execute("ALTER TABLE mislaid RENAME TO events")
        database.execute("ALTER TABLE undone RENAME TO jobs")
    manifest_path.write_bytes(manifest)
    device.say(EVENT)
    wait_until(lambda: device.acknowledged, "an acknowledgement")
    assert federation.command("release", str(federation.directory / "v1")).returncode == 0
