"""What an owner had forgotten is gone, by command and by API; a lost key or a full disk costs no answer."""

import json
import os
import shlex
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.tensors.features import Feature
from tests.simulators.agent import MODEL, REPOSITORY, AgentProcess, install_version
from tests.simulators.samples import open_device_samples
from tests.simulators.small_disk import fill_disk, mounted_disk

FEATURES = (Feature("age", scale=(50, 10)), Feature("pain", one_hot=("no", "yes")), Feature("rate", impute=0))
CONFIG = '[samples]\nconsent = true\nforget_by = ["patient"]\n[samples.fields.patient]\nhash = true\n'
ROWS = [
    {"x": {"age": age, "pain": "yes", "patient": patient}, "y": label}
    for age, patient, label in (
        (30, "Ada", "low"),
        (40, "Ada", "high"),
        (50, "Bob", "high"),
        (50, "Cyd", "high"),
        (50, "Cyd", "low"),
        (60, "Dan", "low"),
    )
]
TENSOR = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
SAMPLE = {"x": [1.0, 2.0, 3.0, 4.0], "y": 1}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with start_device(tmp_path_factory.mktemp("forget"), CONFIG, features=FEATURES) as device:
        yield device


def start_device(directory: Path, extra: str = "", *, features: tuple[Feature, ...] = ()) -> AgentProcess:
    device = AgentProcess(directory, extra=extra)
    device.state_dir.mkdir(exist_ok=True)
    install_version(device.state_dir, trainable=True, features=features)
    return device


def keep(device: AgentProcess, samples: list[dict[str, object]]) -> list[int]:
    kept = device.ask("POST", "/v1/samples", json={"samples": samples})
    assert kept.is_success, kept.text
    ids: list[int] = kept.json()["ids"]
    return ids


def infer(device: AgentProcess) -> dict[str, object]:
    answer = httpx.post(f"{device.url}/v2/models/{MODEL}/infer", json=TENSOR)
    assert answer.is_success, answer.text
    document: dict[str, object] = answer.json()
    return document


def command(device: AgentProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", "forget", *arguments, "--uds", str(device.uds_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def read_sealed(device: AgentProcess) -> dict[int, bytes]:
    connection = sqlite3.connect(device.state_dir / "samples.db")
    sealed = dict(connection.execute("SELECT row, sealed FROM records"))
    connection.close()
    return sealed


def has_bytes(device: AgentProcess, sealed: bytes) -> bool:
    data = b"".join(path.read_bytes() for path in device.state_dir.glob("samples.db*"))
    return any(sealed[start : start + 16] in data for start in range(0, len(sealed) - 15, 8))


def test_command_forgets_by_id_by_values_and_all_and_leaves_no_byte(device: AgentProcess) -> None:
    ids = keep(device, ROWS)
    sealed = read_sealed(device)
    assert all(has_bytes(device, data) for data in sealed.values())

    local_dir = device.state_dir / "training/local"  # what a round made of these samples
    local_dir.mkdir(parents=True)
    (local_dir / f"{MODEL}.sealed").write_bytes(b"parameters")
    done = command(device, str(ids[5]), str(ids[5] + 1000), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"forgotten": 1, "waiting": 0, "kept": 5})
    done = command(device, "--where", "patient=Ada")
    assert (done.returncode, done.stdout) == (0, "2 samples are forgotten, 3 are left on this device\n")
    done = command(device, "--where", "age=50", "--where", "y=high", "--where", "patient=Cyd")
    assert (done.returncode, done.stdout) == (0, "1 samples are forgotten, 2 are left on this device\n")
    assert not local_dir.exists()
    kept = {ids[2], ids[4]}
    assert read_sealed(device) == {row: sealed[row] for row in kept}
    assert {row for row, data in sealed.items() if has_bytes(device, data)} == kept

    waiting = infer(device)
    done = command(device, "--all")
    assert done.returncode == 0
    assert done.stdout == (
        "2 samples are forgotten, 0 are left on this device\n1 answered requests wait for their truth no more\n"
    )
    assert not any(has_bytes(device, data) for data in sealed.values())
    assert device.ask("POST", "/v1/feedback", json={"id": waiting["id"], "target": 2}).status_code in (404, 410)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 1, "say which"),
        (("1", "--all"), 1, "say which"),
        (("--where", "street=x"), 1, "samples.forget_by"),
        (("--where", "age=old"), 1, "age"),
        (("--where", "age"), 2, "COLUMN=VALUE"),
    ],
)
def test_command_that_does_not_say_which_forgets_nothing(
    device: AgentProcess, arguments: tuple[str, ...], code: int, said: str
) -> None:
    keep(device, ROWS[:1])
    before = device.status()["samples"]
    done = command(device, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert device.status()["samples"] == before > 0


def test_api_is_the_owners_and_takes_exactly_one_wish(device: AgentProcess) -> None:
    assert httpx.post(f"{device.url}/v1/forget", json={"all": True}).status_code == 401
    for body in (
        {},
        {"ids": [], "where": {}},
        {"ids": [1], "all": True},
        {"ids": [0]},
        {"ids": "1"},
        [],
        {"all": "yes"},
    ):
        refused = device.ask("POST", "/v1/forget", json=body)
        assert refused.status_code == 400, body
        assert "expected" in refused.json()["error"]
    waiting = infer(device)
    assert device.ask("POST", "/v1/forget", json={"ids": [waiting["id"]]}).json()["waiting"] == 1


@pytest.mark.parametrize("fault", ["lost", "another"])
def test_device_with_a_lost_or_wrong_key_serves_on_and_keeps_and_gives_nothing(tmp_path: Path, fault: str) -> None:
    device = start_device(tmp_path)
    with open_device_samples(device.state_dir) as store:
        store.add([(np.array(SAMPLE["x"]), np.array(SAMPLE["y"]))])
    key_path = device.state_dir / "samples.key"
    key_path.unlink()
    if fault == "another":
        key_path.write_bytes(bytes(32))
        key_path.chmod(0o600)
    said = "samples.key is missing" if fault == "lost" else "sealed with another key than this device has now"
    with device:
        infer(device)
        assert device.status()["samples"] == 1
        refused = device.ask("POST", "/v1/samples", json={"samples": [SAMPLE]})
        assert refused.status_code == 503
        done = command(device, "--where", "y=1")
        assert done.returncode == 1
        for text in (refused.json()["error"], done.stderr):
            assert said in text
            assert "edge-agent forget --all" in text
        assert done.stderr.count("\n") == 1
        assert device.status()["samples"] == 1
        assert key_path.exists() == (fault == "another")  # none was made in its place

        assert command(device, "--all").stdout == "1 samples are forgotten, 0 are left on this device\n"
        assert keep(device, [SAMPLE]) == [2]
        infer(device)


def test_device_with_a_full_disk_serves_keeps_nothing_new_and_forgets(tmp_path: Path) -> None:
    with mounted_disk(tmp_path, size_mb=4) as disk, start_device(disk) as device:
        ids = keep(device, [SAMPLE] * 200)
        sealed = read_sealed(device)
        fill_disk(disk)
        infer(device)
        while (refused := device.ask("POST", "/v1/samples", json={"samples": [SAMPLE] * 200})).is_success:
            ids += refused.json()["ids"]
        assert refused.status_code == 507
        assert command(device, str(ids[0])).returncode == 0
        assert not has_bytes(device, sealed[ids[0]])
        assert json.loads(command(device, "--all", "--json").stdout) == {
            "forgotten": len(ids) - 1,
            "waiting": 0,
            "kept": 0,
        }
        assert not any(has_bytes(device, data) for data in sealed.values())
        infer(device)
        assert device.status()["samples"] == 0


def test_owner_who_asks_for_the_status_while_the_key_is_awaited_costs_no_answer(tmp_path: Path) -> None:
    fifo = tmp_path / "key"
    os.mkfifo(fifo)
    extra = f"[samples]\nkey_command = {json.dumps(shlex.join(['cat', str(fifo)]))}\n"
    with start_device(tmp_path / "device", extra) as device, ThreadPoolExecutor() as threads:
        keeping = threads.submit(keep, device, [SAMPLE])
        with fifo.open("wb") as key, socket.socket(socket.AF_UNIX) as owner:  # the command reads: the store is locked
            owner.connect(str(device.uds_path))
            owner.sendall(b"GET /v1/status HTTP/1.1\r\nhost: device\r\n\r\n")
            infer(device)
            assert not keeping.done()
            key.write(bytes(range(32)))
        assert keeping.result() == [1]
        assert device.status()["samples"] == 1
