import os
import signal
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_agent.samples.cipher import open_cipher
from edge_agent.trainer import LEDGER_NAME
from edge_agent.training.job import build_job, parse_event
from edge_agent.training.ledger import open_ledger
from edge_agent.training.local import LocalParameters
from fl_server.rounds.flower import Session
from fl_server.rounds.run import RunSpec, build_round_dir, create_run, load_parameters, save_cohort
from models.contract.ledger import LedgerHead, Spent
from models.contract.manifest import MANIFEST_NAME, TRAIN_STEP_NAME
from models.contract.privacy import Unit
from tests.simulators.linear import save_opacus_version
from tests.simulators.samples import open_device_samples
from tests.simulators.step_graph import (
    FAULTS,
    build_privacy,
    build_step_graph,
    build_step_manifest,
    build_training,
    save_step_version,
)
from tests.simulators.superlink import running_fleet, wait_until
from tests.simulators.training import Orders, build_training_job

# A reinstalled device: the coordinator remembers steps under the same plan.
COPY = LedgerHead(
    entries=9,
    digest="d" * 64,
    spent=(Spent(model="linear", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(1), steps=10),),
)
PROGRAM = [sys.executable, "-m", "edge_agent.trainer"]


def start_trainer(stdin=subprocess.PIPE):
    return subprocess.Popen(PROGRAM, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def orders(tmp_path):
    manifest = save_step_version(tmp_path / "version", build_step_graph())
    return Orders(graph_digest=manifest.files[TRAIN_STEP_NAME].digest)


def assert_one_line(process, job_bytes, reason):
    out, error = process.communicate(job_bytes, timeout=60)
    assert process.returncode == 1
    assert out == b""
    assert error.count(b"\n") == 1, error.decode()
    assert reason in error.decode()


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", b"[]"])
def test_stdin_that_is_no_job_ends_it_with_one_line(data):
    assert_one_line(start_trainer(), data, "TrainingJob")


@pytest.mark.parametrize(
    "fault", ["graph altered", "graph missing", "no manifest", "bad manifest", "clips nothing", "key", "ledger"]
)
def test_what_cannot_be_trusted_ends_it_with_one_line_before_it_joins(tmp_path, orders, fault):
    version, key_pem = tmp_path / "version", orders.key_pem
    if fault == "graph altered":
        with (version / TRAIN_STEP_NAME).open("ab") as file:
            file.write(b"\0")
    elif fault == "graph missing":
        (version / TRAIN_STEP_NAME).unlink()
    elif fault == "no manifest":
        (version / MANIFEST_NAME).unlink()
    elif fault == "bad manifest":
        (version / MANIFEST_NAME).write_bytes(b"{}")
    elif fault == "clips nothing":
        save_step_version(version, build_step_graph(factor=FAULTS["ignores the clip"]))
    elif fault == "key":
        key_pem = "no key"
    else:
        (tmp_path / "training").mkdir()
        (tmp_path / "training" / LEDGER_NAME).write_bytes(b"damaged\n")
    job = build_training_job(tmp_path, coordinator_key_pem=key_pem)
    reason = {"clips nothing": "does not clip", "key": "key", "ledger": "line 1", "graph altered": "digest"}.get(
        fault, "anifest" if "manifest" in fault else TRAIN_STEP_NAME
    )
    assert_one_line(start_trainer(), build_job(job), reason)


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (None, "trains with the Opacus engine, which needs its definition on this device"),
        ("tests.simulators.linear:doubled_3", "does not compute what evaluate.onnx of version 1 of 'linear' does"),
    ],
)
def test_device_without_the_definition_says_so_and_does_not_join(tmp_path, definition, reason):
    manifest = save_opacus_version(tmp_path / "version")
    key_pem = Orders(graph_digest=manifest.step_digest).key_pem
    trainer = start_trainer()
    job = build_training_job(tmp_path, coordinator_key_pem=key_pem, definition=definition)
    out, error = trainer.communicate(build_job(job), timeout=60)
    assert (trainer.returncode, error) == (0, b"")
    (event,) = [parse_event(line) for line in out.splitlines()]
    assert event.event == "refused"
    assert reason in event.message
    assert not (tmp_path / "training").exists()


def handles_sigterm(pid):
    (caught,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return int(caught.split()[1], 16) & 1 << signal.SIGTERM - 1


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_dies_with_the_agent_that_started_it():
    reader, writer = os.pipe()  # stays open: not the end of stdin ends it
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; p = subprocess.Popen({PROGRAM!r}, stdin={reader}); print(p.pid, flush=True); p.wait()",
        ],
        pass_fds=[reader],
        stdout=subprocess.PIPE,
    )
    try:
        trainer = int(parent.stdout.readline())
        wait_until(lambda: handles_sigterm(trainer), what="the training process to be ready")
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_running(trainer), what="the end of the training process")
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        os.close(reader)
        os.close(writer)


def test_device_without_ledger_and_without_copy_does_not_even_join(tmp_path, orders):
    trainer = start_trainer()
    job = build_training_job(tmp_path, coordinator_key_pem=orders.key_pem, ledger_copy=None)
    out, error = trainer.communicate(build_job(job), timeout=60)
    assert (trainer.returncode, error) == (0, b"")
    (event,) = [parse_event(line) for line in out.splitlines()]
    assert event.event == "refused"
    assert "this device has no privacy ledger" in event.message
    assert (tmp_path / "training" / LEDGER_NAME).read_bytes() == b""


def create_linear_run(tmp_path, fleet, orders, *names, **changes):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    key_path = run_dir / "orders.pem"
    key_path.write_bytes(orders.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    values = {
        "fleet": "demo",
        "model": "linear",
        "run": "run-1",
        "graph_digest": orders.graph_digest,
        "layout": build_step_manifest(build_step_graph()).training.layout,
        "privacy": build_privacy(),
        "training": build_training(rounds=3),
        "devices": fleet.superlink.register("device-1", *names),
        "quorum": 1,
        "deadline_s": 30,
        "join_timeout_s": 30,
        "superlink": fleet.superlink.address,
        "ca_path": str(fleet.superlink.ca_path),
        "superexec_secret_path": str(fleet.superlink.secret_path),
        "order_key_path": str(key_path),
        "update_norm_limit": Decimal(1000),
    }
    spec = RunSpec(**{**values, **changes})
    create_run(run_dir, spec, np.zeros(spec.layout.size, np.float32))
    return run_dir, spec


def start_trainer_of(tmp_path, fleet, orders, **changes):
    values = {
        "coordinator_key_pem": orders.key_pem,
        "superlink": fleet.superlink.address,
        "ca_path": str(fleet.superlink.ca_path),
        "node_key_path": str(fleet.superlink.node_keys["device-1"]),
        "idle_timeout_s": 5.0,
    }
    trainer = start_trainer()
    trainer.stdin.write(build_job(build_training_job(tmp_path, **{**values, **changes})))
    trainer.stdin.close()
    trainer.stdin = None
    return trainer


def test_a_run_over_a_real_superlink_trains_charges_and_ends_when_idle(tmp_path, orders):
    with open_device_samples(tmp_path, "linear") as samples:
        generator = np.random.default_rng(0)
        samples.add(
            [
                (generator.normal(size=3).astype(np.float32), np.float32(generator.normal()).reshape(()))
                for _ in range(40)
            ]
        )
    with running_fleet(tmp_path) as fleet:
        run_dir, spec = create_linear_run(tmp_path, fleet, orders)
        trainer = start_trainer_of(tmp_path, fleet, orders, ledger_copy=COPY)
        rounds = [event for event in fleet.start_driver(run_dir).run_to_end() if event.event == "round"]
        out, error = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, error.decode()
    events = [parse_event(line) for line in out.splitlines()]
    assert [event.event for event in events] == ["joined", "trained", "trained", "trained", "ended"]
    assert [tuple(event.accepted) for event in rounds] == [("device-1",)] * 3
    with open_ledger(tmp_path / "training" / LEDGER_NAME) as ledger:
        assert [entry.round for entry in ledger.entries] == [0, 1, 2, 3]
        assert ledger.entries[0].restored_from == COPY.digest
        assert events[0].ledger is None  # the coordinator's own word is not told back to it: it would add it up again
        assert events[3].ledger == ledger.head
        assert ledger.head.spent[0].steps == COPY.spent[0].steps + 3 * spec.training.steps
        assert events[3].epsilon == str(ledger.entries[-1].epsilon_after)
    assert np.abs(load_parameters(run_dir, spec.layout, 3)).max() > 0


@pytest.mark.parametrize("engine", ["onnx", "opacus"])
def test_local_parameters_move_on_the_device_and_nothing_of_them_travels(tmp_path, engine):
    """Targets are 50 and inputs 0: only the bias, which is local, has anything to learn."""
    save = {"onnx": partial(save_step_version, step=build_step_graph()), "opacus": save_opacus_version}[engine]
    manifest = save(tmp_path / "version", local=True)
    orders = Orders(graph_digest=manifest.step_digest)
    with open_device_samples(tmp_path, "linear") as samples:
        samples.add([(np.zeros(3, np.float32), np.float32(50).reshape(()))] * 20)
    privacy = build_privacy(noise_multiplier="0.05", sampling_rate="1", epsilon="100000")
    with running_fleet(tmp_path) as fleet:
        run_dir, _ = create_linear_run(
            *(tmp_path, fleet, orders),
            layout=manifest.training.shared,
            privacy=privacy,
            training=build_training(rounds=1, steps=2, expected_batch="1", learning_rate="0.1"),
        )
        limits = dict.fromkeys(("epsilon_limit", "total_epsilon_limit"), Decimal(100_000))
        definition = None if engine == "onnx" else "tests.simulators.linear:features_3"
        trainer = start_trainer_of(
            *(tmp_path, fleet, orders), noise_multiplier_limit=Decimal(0), definition=definition, **limits
        )
        events = fleet.start_driver(run_dir).run_to_end()
        trainer.terminate()
        _, error = trainer.communicate(timeout=60)
    assert [event.event for event in events] == ["joined", "round", "done"], error.decode()
    key = bytes.fromhex(build_training_job(tmp_path).samples_key)
    training_dir = tmp_path / "training"
    local = LocalParameters(training_dir, manifest, np.zeros(1, np.float32), open_cipher(key)).begin(
        "run-2", 1, Unit.SAMPLE
    )
    assert local[0] > 0.25 + 2  # twice the clipping norm of 20 samples, times the learning rate, but for the noise
    (update,) = (training_dir / "updates").iterdir()
    assert len(update.read_bytes()) == 4 * 3
    assert np.abs(load_parameters(run_dir, manifest.training.shared, 1)).max() < 0.5
    with open_ledger(training_dir / LEDGER_NAME) as ledger:
        assert [entry.round for entry in ledger.entries] == [1]
    for path in (path for path in run_dir.rglob("*") if path.is_file()):
        assert local.tobytes() not in path.read_bytes()


def test_superlink_killed_in_a_round_of_the_device_unit_costs_no_device_a_second_charge(tmp_path, orders):
    with open_device_samples(tmp_path, "linear") as samples:
        samples.add([(np.ones(3, np.float32), np.float32(1).reshape(()))] * 20)
    privacy = build_privacy(unit=Unit.DEVICE, noise_multiplier="1.2", sampling_rate="0.5")
    with running_fleet(tmp_path) as fleet:
        run_dir, _ = create_linear_run(
            *(tmp_path, fleet, orders, "device-2"), privacy=privacy, training=build_training(rounds=2), deadline_s=60
        )
        for number in (1, 2):
            save_cohort(run_dir, number, ("device-1", "device-2"))
        other = fleet.start_node("device-2", behaviour="held")
        trainer = start_trainer_of(tmp_path, fleet, orders, trusts_coordinator=True, idle_timeout_s=60.0)
        driver = fleet.start_driver(run_dir)
        spooled = build_round_dir(run_dir, 1) / "updates/device-1.f32"
        wait_until(spooled.exists, what="the update of device-1 on disk")
        assert [other.next_line(), other.next_line()] == [b"joined\n", b"holding 1\n"]
        fleet.superlink.kill()
        fleet.release("device-2")
        fleet.superlink.start()
        rounds = [event for event in driver.run_to_end() if event.event == "round"]
        trainer.terminate()
        out, error = trainer.communicate(timeout=60)
    assert [event.accepted for event in rounds] == [("device-1", "device-2")] * 2, error.decode()
    assert [parse_event(line).event for line in out.splitlines()] == ["joined", "trained", "trained"]
    with open_ledger(tmp_path / "training" / LEDGER_NAME) as ledger:
        assert [(entry.round, entry.steps) for entry in ledger.entries] == [(1, 2), (2, 0)]  # the run, once


def test_sample_that_was_forgotten_between_two_rounds_moves_no_parameter(tmp_path, orders):
    """One sample pulls the first weight by the whole clipping norm, 20 standard deviations of the noise; others never."""
    pulling = (np.array([10, 0, 0], np.float32), np.float32(-100).reshape(()))
    idle = (np.zeros(3, np.float32), np.float32(0).reshape(()))
    with open_device_samples(tmp_path, "linear") as samples:
        samples.add([idle] * 5 + [pulling] + [idle] * 5)
    privacy = build_privacy(noise_multiplier="0.05", sampling_rate="1", epsilon="100000")
    training = build_training(rounds=2, steps=1, expected_batch="1", learning_rate="1")
    with running_fleet(tmp_path) as fleet:
        run_dir, spec = create_linear_run(tmp_path, fleet, orders, privacy=privacy, training=training)
        limits = dict.fromkeys(("epsilon_limit", "total_epsilon_limit"), Decimal(100_000))
        trainer = start_trainer_of(tmp_path, fleet, orders, noise_multiplier_limit=Decimal(0), **limits)
        driver = fleet.start_driver(run_dir)
        while driver.next_event().event != "round":
            pass
        with open_device_samples(tmp_path, "linear") as samples:  # the training process has its own open, too
            assert samples.forget([6]) == 1
        driver.say("continue")
        driver.run_to_end()
        trainer.terminate()
        _, error = trainer.communicate(timeout=60)
    assert trainer.returncode == 128 + signal.SIGTERM, error.decode()
    first, second = (load_parameters(run_dir, spec.layout, number)[0] for number in (1, 2))
    assert abs(first) > 0.5
    assert abs(second - first) < 0.5


def test_trainer_that_is_told_to_end_takes_leave_so_that_no_round_waits_for_it(tmp_path, orders):
    with running_fleet(tmp_path) as fleet:
        (node_id,) = fleet.superlink.register("device-1").values()
        job = build_training_job(
            tmp_path,
            coordinator_key_pem=orders.key_pem,
            superlink=fleet.superlink.address,
            ca_path=str(fleet.superlink.ca_path),
            node_key_path=str(fleet.superlink.node_keys["device-1"]),
            idle_timeout_s=60.0,
        )
        trainer = start_trainer()
        trainer.stdin.write(build_job(job))
        trainer.stdin.close()
        trainer.stdin = None
        assert parse_event(trainer.stdout.readline()).event == "joined"
        with Session(
            address=fleet.superlink.address,
            ca_path=fleet.superlink.ca_path,
            superexec_secret_path=fleet.superlink.secret_path,
            size=4,
        ) as session:
            assert node_id in session.list_online()
            session.send(np.zeros(4, np.float32), {node_id: b"no order"}, lifetime_s=60)
            trainer.terminate()
            out, error = trainer.communicate(timeout=20)
            assert (trainer.returncode, error) == (128 + signal.SIGTERM, b""), out
            assert node_id not in session.list_online()
            assert [reply.update for reply in session.collect()] == [None]
