"""A whole device against a real broker: killed, cut off, lied to, and told to train."""

import asyncio
import contextlib
import json
import platform
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fl_server.directory import Directory
from fl_server.rollout.keys import load_key
from fl_server.rollout.publisher import Publisher, list_blobs
from fl_server.rollout.repository import ReleaseRepository
from models.contract.encoding import build_digest, build_json
from models.contract.envelope import WakeCommand, build_envelope
from models.contract.floors import FLOORS_NAME, Floor, Floors
from models.contract.messages import Ack
from models.contract.offer import build_offer
from models.contract.terms import Role, Split
from models.contract.topics import Channel, build_blob_topic, build_device_topic, build_offer_topic, build_run_topic
from tests.simulators.agent import DEVICE, FLEET, MODEL, REPOSITORY, AgentProcess, install_version
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.observer import Observer
from tests.simulators.releases import build_challenge
from tests.simulators.tiny_models import save_version
from tests.simulators.waiting import wait_until

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
COMMAND = build_device_topic(FLEET, DEVICE, Channel.COMMAND)
FEDERATION = '[federation]\nsuperlink = "127.0.0.1:1"\nca_path = "ca.pem"\nnode_key_path = "node.pem"\n'
INFER = f"/v2/models/{MODEL}/infer"
GOOD = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path) as mosquitto:
        yield mosquitto


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as seen:
        yield seen


def build_device(tmp_path: Path, broker: Mosquitto, *, extra: str = "", trainable: bool = False) -> AgentProcess:
    device = AgentProcess(tmp_path / "device", broker_port=broker.port, extra=extra)
    device.state_dir.mkdir()
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (device.state_dir / "coordinator.pem").write_bytes(public)
    install_version(device.state_dir, trainable=trainable)
    return device


def wait_connected(device: AgentProcess) -> None:
    wait_until(lambda: device.status()["connected"], "the device to connect")


def wait_event(observer: Observer, kind: str, said: str) -> dict:
    def find() -> list[dict]:
        return [
            event for event in observer.documents("event") if event.get("kind") == kind and said in event["message"]
        ]

    wait_until(find, f"event {kind} that says {said!r}")
    return find()[0]


def build_command(
    sequence: int,
    *,
    key: Ed25519PrivateKey = KEY,
    run: str = "run-1",
    model: str = MODEL,
    floors: Floors | None = None,
    idle_timeout_s: int = 5,
) -> bytes:
    now_s = int(time.time())
    command = WakeCommand(
        fleet=FLEET,
        audience=DEVICE,
        sequence=sequence,
        issued_at=now_s,
        expires_at=now_s + 60,
        model=model,
        run=run,
        poll_interval_ms=100,
        idle_timeout_s=idle_timeout_s,
        floors=floors,
    )
    return build_envelope(command, key)


def test_status_is_retained_and_the_will_tells_of_a_killed_device(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with build_device(tmp_path, broker) as device:
        wait_until(lambda: observer.documents("status"), "the first status")
        online = observer.documents("status")[-1]
        assert (online["online"], online["version"], online["slot"], online["trains"]) == (True, 1, "a", False)
        device.kill()
        wait_until(lambda: not observer.documents("status")[-1]["online"], "the will")
        assert observer.documents("status")[-1]["version"] == 1
        assert observer.documents("status")[-1]["traits"]["hardware"] == platform.machine()
        device.start()
        wait_until(lambda: observer.documents("status")[-1]["online"], "the device to be back")
    wait_until(lambda: not observer.documents("status")[-1]["online"], "the will of a device that was stopped")
    with Observer(broker.port) as late:
        wait_until(lambda: late.documents("status"), "the retained status")
        assert late.seen("status")[0].retained


def test_junk_on_every_topic_is_ignored_and_counted_and_the_model_answers(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    topics = [
        build_offer_topic(FLEET),
        build_blob_topic(FLEET, "0" * 64, 0),
        build_run_topic(FLEET, MODEL),
        *(build_device_topic(FLEET, DEVICE, channel) for channel in Channel),
    ]
    with build_device(tmp_path, broker) as device:
        wait_connected(device)
        for topic in topics:
            for junk in (b"", b"\xff\x00", b"{}", b"[" * 50_000, b'{"payload": 1}', b"null"):
                observer.publish(topic, junk)
        wait_until(lambda: device.status()["ignored_messages"] >= 11, "the junk to be counted")
        observer.publish(COMMAND, build_command(1, model="other"))
        wait_event(observer, "TRAINING_REFUSED", "only serves")
        assert httpx.post(device.url + INFER, json=GOOD).is_success
        assert device.status()["ready"]
        assert "Traceback" not in device.log_path.read_text()


def read_telemetry(device: AgentProcess, *, since_s: float) -> list[dict]:
    """Return what telemetry waits in the device's outbox."""
    with contextlib.closing(sqlite3.connect(device.state_dir / "outbox.db")) as outbox:
        query = "SELECT payload FROM items WHERE kind = 'telemetry' AND said_s >= ?"
        return [json.loads(payload) for (payload,) in outbox.execute(query, (since_s,))]


def test_device_serves_while_the_broker_is_gone_and_comes_back(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with build_device(tmp_path, broker, extra="[telemetry]\ninterval_s = 1\n") as device:
        wait_connected(device)
        wait_until(lambda: observer.documents("telemetry"), "telemetry")
        broker.kill()
        lost_s = time.time()
        wait_until(lambda: not device.status()["connected"], "the loss to be noticed")
        assert httpx.post(device.url + INFER, json=GOOD).is_success
        wait_until(lambda: read_telemetry(device, since_s=lost_s), "telemetry to be kept")
        kept = read_telemetry(device, since_s=lost_s)[0]
        device.kill()
        broker.start()
        with Observer(broker.port) as again:
            device.start()
            wait_until(lambda: kept in again.documents("telemetry"), "the telemetry that was kept")
            assert (kept["version"], kept["dropped"]) == (1, 0)
            assert kept["rss_mb"] > 10
            wait_until(lambda: kept not in read_telemetry(device, since_s=lost_s), "it to leave the outbox")


def test_device_that_is_away_for_longer_than_it_keeps_telemetry_says_how_much_is_lost(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    extra = "[telemetry]\ninterval_s = 1\nkept_days = 0.00002\n"  # 1.7 s
    with build_device(tmp_path, broker, extra=extra) as device:
        wait_connected(device)
        broker.kill()
        wait_until(lambda: device.status()["dropped_messages"] >= 2, "telemetry to be dropped")
        broker.start()
        with Observer(broker.port) as again:
            wait_until(lambda: again.documents("telemetry"), "telemetry again")
            wait_until(lambda: again.documents("telemetry")[-1]["dropped"] >= 2, "the loss to be told")
            assert len(again.documents("status")) == 1  # only how it is now
            assert again.documents("status")[0]["online"]


def test_forged_replayed_and_foreign_commands_are_refused_and_reported(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with build_device(tmp_path, broker, extra=FEDERATION) as device:
        wait_connected(device)
        observer.publish(COMMAND, build_command(5, key=Ed25519PrivateKey.generate()))
        wait_event(observer, "ORDER_REFUSED", "not the coordinator's")
        genuine = build_command(5)
        observer.publish(COMMAND, genuine)
        refused = wait_event(observer, "TRAINING_REFUSED", "no version that can be trained")
        assert refused["run"] == "run-1"
        observer.publish(COMMAND, genuine)
        wait_event(observer, "ORDER_REFUSED", "comes after command 5")
        device.kill()
        device.start()
        wait_connected(device)
        observer.publish(COMMAND, build_command(4))
        wait_event(observer, "ORDER_REFUSED", "4 comes after command 5")
        observer.publish(COMMAND, build_command(6, model="other"))
        wait_event(observer, "TRAINING_REFUSED", "not 'other'")


def test_training_process_that_dies_is_an_event_and_serving_goes_on(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with build_device(tmp_path, broker, extra=FEDERATION, trainable=True) as device:
        wait_connected(device)
        assert observer.documents("status")[-1]["trains"]
        observer.publish(COMMAND, build_command(1))
        ended = wait_event(observer, "TRAINING_ENDED", "the training process ended with exit code")
        assert ended["run"] == "run-1"
        assert httpx.post(device.url + INFER, json=GOOD).is_success
        wait_until(lambda: device.status()["training"] is None, "the run to be over")


def find_trainer(device: AgentProcess) -> psutil.Process | None:
    for child in psutil.Process(device.pid).children():
        with contextlib.suppress(psutil.Error):
            if "edge_agent.trainer" in child.cmdline():
                return child
    return None


@pytest.mark.parametrize(
    ("deadly", "said"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "said nothing for 2 s")]
)
def test_training_process_that_is_killed_for_memory_or_hangs_costs_no_answer_and_is_reported(
    tmp_path: Path, broker: Mosquitto, observer: Observer, deadly: signal.Signals, said: str
) -> None:
    extra = f"{FEDERATION}[training]\nmax_round_s = 1\n"
    with build_device(tmp_path, broker, extra=extra, trainable=True) as device:
        wait_connected(device)
        observer.publish(COMMAND, build_command(1, idle_timeout_s=1))
        wait_until(lambda: find_trainer(device), "the training process")
        trainer = find_trainer(device)
        assert trainer is not None
        trainer.send_signal(deadly)
        statuses = []

        def is_over() -> bool:
            statuses.append(httpx.post(device.url + INFER, json=GOOD).status_code)
            return device.status()["training"] is None

        wait_until(is_over, "the run to be over")
        assert set(statuses) == {200}
        assert not trainer.is_running()
        assert wait_event(observer, "TRAINING_ENDED", said)["run"] == "run-1"


def test_machine_that_its_owner_keeps_from_training_says_so_and_starts_nothing(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    hour = (time.localtime().tm_hour + 12) % 24
    extra = f'{FEDERATION}[training]\nhours = "{hour:02}:00-{hour:02}:01"\n'
    with build_device(tmp_path, broker, extra=extra, trainable=True) as device:
        wait_connected(device)
        observer.publish(COMMAND, build_command(1))
        refused = wait_event(observer, "TRAINING_REFUSED", "trains at other hours (training.hours)")
        assert refused["run"] == "run-1"
        assert device.status()["training"] is None
        assert find_trainer(device) is None


def test_events_come_again_after_a_kill_until_they_are_acknowledged(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with build_device(tmp_path, broker) as device:
        wait_connected(device)
        broker.kill()
        wait_until(lambda: not device.status()["connected"], "the loss to be noticed")
        device.kill()
        (device.state_dir / "slots" / "a" / "inference.onnx").write_bytes(b"damaged")
        device.start()
        wait_until(lambda: device.status()["unsent_events"] == 1, "the event of the damaged slot")
        device.kill()
        broker.start()
        with Observer(broker.port) as again:
            device.start()
            event = wait_event(again, "FAILED", "damaged")
            wait_connected(device)
            again.publish(build_device_topic(FLEET, DEVICE, Channel.ACK), build_json(Ack(ids=(event["id"],))))
            wait_until(lambda: device.status()["unsent_events"] == 0, "the event to be acknowledged")


def test_hundred_events_of_a_killed_device_arrive_after_its_and_the_brokers_restart(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    forger = Ed25519PrivateKey.generate()
    with build_device(tmp_path, broker, extra=FEDERATION) as device:
        wait_connected(device)
        for number in range(1, 101):
            observer.publish(COMMAND, build_command(number, key=forger))
            wait_until(lambda: device.status()["unsent_events"] >= number, f"event {number} to wait")  # noqa: B023
        broker.kill()
        device.kill()
        broker.start()
        with Observer(broker.port) as again:
            device.start()
            wait_until(lambda: len({event["id"] for event in again.documents("event")}) == 100, "all events")
            ids = tuple({event["id"] for event in again.documents("event")})
            again.publish(build_device_topic(FLEET, DEVICE, Channel.ACK), build_json(Ack(ids=ids)))
            wait_until(lambda: device.status()["unsent_events"] == 0, "all events to be acknowledged")


class Releases:
    """A coordinator's repository, whose offers the observer publishes."""

    def __init__(self, path: Path, observer: Observer) -> None:
        self.repository = ReleaseRepository.create(Directory(path), now=datetime.now(UTC))
        self.order_key = load_key(Directory(path).order_key_path)
        self._publisher = Publisher(fleet=FLEET, record_path=path / "published.json", publish=self._publish)
        self._observer = observer
        self.root = self.repository.load_root()

    def release(self, versions: dict[Role, Path], split: Split | None = None) -> None:
        manifests = {alias: (version / "manifest.json").read_bytes() for alias, version in versions.items()}
        terms = build_challenge(versions.get("challenger"), split)
        self.repository.set_release(MODEL, manifests, terms=terms, now=datetime.now(UTC))
        pem = self.repository.build_coordinator_pem()
        blobs: dict[str, Path | bytes] = {build_digest(pem): pem}
        for version in versions.values():
            blobs |= list_blobs(version)
        asyncio.run(self._publisher.publish(build_offer(self.repository.load_metadata()), blobs))

    async def _publish(self, topic: str, payload: bytes, *, retain: bool, content_type: str) -> None:
        self._observer.publish(topic, payload, retain=retain)


def ask_version(device: AgentProcess, **headers: str) -> str:
    answer = httpx.post(device.url + INFER, json=GOOD, headers=headers)
    assert answer.is_success, answer.text
    return str(answer.json()["model_version"])


def test_challenger_of_a_release_takes_its_share_survives_a_kill_is_promoted_and_yields_to_the_owners(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    versions = {number: tmp_path / f"v{number}" for number in (1, 2, 3)}
    for number, directory in versions.items():
        save_version(directory, version=number)
    releases = Releases(tmp_path / "server", observer)
    all_of_it = Split(weight=Decimal(1))
    with AgentProcess(tmp_path / "device", broker_port=broker.port) as device:
        (device.directory / "root.json").write_bytes(releases.root)
        device.kill()
        device.start()
        releases.release({"champion": versions[1], "challenger": versions[2]}, all_of_it)
        wait_event(observer, "CHALLENGER_SET", "with weight 1")
        wait_until(lambda: observer.documents("status")[-1]["challenger"] == 2, "a status with the challenger")
        assert ask_version(device) == "1"
        assert ask_version(device, **{"Edge-Key": "somebody"}) == "2"
        assert 'version="2"' in httpx.get(device.url + "/metrics").text

        device.kill()
        device.start()
        wait_until(lambda: ask_version(device, **{"Edge-Key": "somebody"}) == "2", "the challenger to be back")
        releases.release({"champion": versions[2]})
        wait_event(observer, "CHALLENGER_ENDED", "names it no more")
        assert ask_version(device) == "2"
        assert observer.documents("status")[-1]["challenger"] is None

        device.kill()
        with device.config_path.open("a") as config:
            config.write(f'[serving]\nchallenger = "{versions[1]}"\nweight = 1.0\n')
        device.start()
        releases.release({"champion": versions[2], "challenger": versions[3]}, all_of_it)
        wait_event(observer, "CHALLENGER_REFUSED", "the owner's own, [serving] challenger, stays")
        assert ask_version(device, **{"Edge-Key": "somebody"}) == "1"


def test_new_device_refuses_what_is_older_than_its_enrolment_and_any_device_what_a_command_says_is_old(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    versions = {number: tmp_path / f"v{number}" for number in (1, 2)}
    for number, directory in versions.items():
        save_version(directory, version=number)
    releases = Releases(tmp_path / "server", observer)
    releases.release({"champion": versions[1]})
    replayed = build_offer(releases.repository.load_metadata())
    releases.release({"champion": versions[2]})
    with AgentProcess(tmp_path / "device", broker_port=broker.port) as device:
        device.kill()
        (device.directory / "root.json").write_bytes(releases.root)
        (device.directory / FLOORS_NAME).write_bytes(build_json(floors := releases.repository.build_floors()))
        observer.publish(build_offer_topic(FLEET), replayed, retain=True)
        device.start()
        wait_event(observer, "FAILED", "timestamp version 2 is older than 3, told by the coordinator")
        observer.publish(build_offer_topic(FLEET), build_offer(releases.repository.load_metadata()), retain=True)
        wait_until(lambda: device.status()["version"] == 2, "the version of the newest offer")

        next_timestamp = Floor(version=5, keys=floors.roles["timestamp"].keys)
        told = replace(floors, roles=floors.roles | {"timestamp": next_timestamp})
        observer.publish(COMMAND, build_command(1, key=releases.order_key, floors=told))
        wait_event(observer, "TRAINING_REFUSED", "only serves")
        releases.release({"champion": versions[1]})
        wait_event(observer, "FAILED", "timestamp version 4 is older than 5, told by the coordinator")
        assert device.status()["version"] == 2


def edge_agent(device: AgentProcess, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments, "--uds", str(device.uds_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
        check=False,
    )


def test_commands_talk_to_a_running_agent(tmp_path: Path, broker: Mosquitto) -> None:
    np.savez(tmp_path / "s.npz", x=np.ones((450, 4), np.float32), y=np.zeros(450, np.int64))
    (tmp_path / "bad.csv").write_text("1,2\n3,x\n")
    with build_device(tmp_path, broker) as device:
        assert "450 samples" in edge_agent(device, "ingest", str(tmp_path / "s.npz")).stdout
        assert json.loads(edge_agent(device, "status", "--json").stdout)["samples"] == 450
        assert "device-1" in edge_agent(device, "status").stdout
        assert "Nothing is spent" in edge_agent(device, "privacy").stdout
        assert json.loads(edge_agent(device, "privacy", "--json").stdout)["spent"] == []
        lines = edge_agent(device, "predict", "-", stdin="[[1, 2, 3, 4], [0, 0, 0, 1]]").stdout.splitlines()
        assert lines == ["logits[0] low: 10 10 10", "logits[1] low: 1 1 1"]
        one_row = edge_agent(device, "predict", "-", "--json", stdin='{"features": [1, 1, 1, 1]}')
        assert json.loads(one_row.stdout)["outputs"][0]["data"] == [4, 4, 4]
        for failed, said in (
            (edge_agent(device, "ingest", str(tmp_path / "bad.csv")), "bad.csv:2"),
            (edge_agent(device, "predict", "-", stdin="{"), "not JSON"),
            (edge_agent(device, "predict", "-", stdin="[1, 2]"), "expected shape"),
            (edge_agent(device, "predict", "-", stdin='{"x": [1]}'), "expected the inputs features"),
        ):
            assert failed.returncode == 1
            assert said in failed.stderr
            assert len(failed.stderr.splitlines()) == 1
    gone = edge_agent(device, "status")
    assert (gone.returncode, len(gone.stderr.splitlines())) == (1, 1)
    assert "edge-agent run" in gone.stderr


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({'state_dir = "state"': 'state_dir = "other"'}, "another agent answers there"),
        ({'/s"': '/other"'}, "state_dir: another agent is running in "),
    ],
    ids=["socket", "state directory"],
)
def test_second_agent_on_the_same_socket_or_state_directory_is_refused(
    tmp_path: Path, broker: Mosquitto, other: dict[str, str], said: str
) -> None:
    with build_device(tmp_path, broker) as device:
        config = device.config_path.read_text().replace(f"port = {device.port}", "port = 65001")
        for found, instead in other.items():
            assert found in config
            config = config.replace(found, instead)
        other_path = device.directory / "other.toml"
        other_path.write_text(config)
        second = subprocess.run(
            [sys.executable, "-m", "edge_agent", "run", "--config", str(other_path)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert said in second.stderr
        assert (str(device.state_dir) in second.stderr) == ("state_dir" in said)
        assert device.status()["device_id"] == "device-1"
