"""`fl-server demo`: eight devices learn digits in private, and each better version reaches them live."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import psutil

from fl_server.demo.federation import LocalFederation
from fl_server.demo.load import Client, LoadGenerator
from fl_server.demo.report import Report, VersionRow, build_table, save_report
from fl_server.errors import ServerError, UsageError
from models.contract.manifest import MANIFEST_NAME, PARAMETERS_NAME, parse_manifest
from models.definitions import digits

MARK = ".edge-fl-demo"  # an --out folder with it is ours to clear
REQUESTS_PER_S = 100.0
MEMORY_INTERVAL_S = 0.5
SEED = 0
DELTA = Decimal("0.001")
# Tuned on the validation part of five splits; tuning itself is not accounted for.
TRAINING = {"steps": 20, "sampling-rate": 0.25, "clipping-norm": 1, "learning-rate": 0.35, "expected-batch": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What `fl-server demo` was asked for."""

    devices: int
    rounds: int
    epsilon: Decimal
    out_dir: Path

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= 50:
            raise UsageError(f"--devices is {self.devices}, must be in 1..50")
        if not 1 <= self.rounds <= 1000 or self.epsilon <= 0:
            raise UsageError("--rounds must be in 1..1000 and --epsilon > 0")


def run_demo(options: DemoOptions) -> None:
    """Run the whole loop and write `report.json` and `report.html` into the out folder.

    Raises:
        UsageError: The out folder holds something else.
        ServerError: A part of the federation failed; everything was ended.
    """
    signal.signal(signal.SIGTERM, _end_like_ctrl_c)
    _clear(options.out_dir)
    splits = digits.load_splits(options.devices, SEED)
    validation = (splits.validation.x, splits.validation.y)
    started = time.monotonic()
    with (
        LocalFederation(
            options.out_dir.resolve(),
            definition="models.definitions.digits:definition",
            model="digits",
            validation=validation,
        ) as federation,
        ExitStack() as stack,
    ):
        _say("starting broker, coordinator and devices")
        federation.start_broker()
        federation.enroll(options.devices)
        federation.start_coordinator()
        federation.start_devices()
        memory = stack.enter_context(_MemoryWatch([device.agent.pid for device in federation.devices if device.agent]))
        for device, samples in zip(federation.devices, splits.devices, strict=True):
            federation.wait_until(device.socket_path.exists, f"the socket of {device.device_id}")
            device.ingest(samples.x, samples.y)
        _say(f"{sum(len(s.y) for s in splits.devices)} samples lie on {options.devices} devices and stay there")
        first = _release_first(federation)
        clients = [Client(device.port, "digits", "image") for device in federation.devices]
        load = LoadGenerator(clients, splits.test.x, requests_per_s=REQUESTS_PER_S)
        stack.callback(load.close)
        _say("a client asks every device for predictions from now on")
        result = _train(federation, options)
        versions = [first, *map(_build_row, result["rounds"])]
        champion = max(row.version for row in versions if row.promoted and row.version is not None)
        federation.wait_until(lambda: federation.all_serve(champion), f"all devices to serve version {champion}")
        load.close()
        per_device = [_measure_accuracy(client, splits.test) for client in clients]
        report = Report(
            model="digits",
            unit="sample",
            epsilon=float(result["epsilon"]),
            delta=float(DELTA),
            seconds=time.monotonic() - started,
            metric_name="accuracy",
            per_device=per_device,
            versions=versions,
            answers=load.answers,
            agent_rss_mb=memory.agent_mb,
            training_rss_mb=memory.training_mb,
        )
    save_report(report, options.out_dir)
    print(f"\n{build_table(report)}\n\nreport: {options.out_dir / 'report.html'}")
    if report.failed:
        raise ServerError(f"{report.failed} of {len(report.answers)} requests failed")


def _release_first(federation: LocalFederation) -> VersionRow:
    """Release the untrained model as version 1 and return once every device serves it."""
    version_dir = federation.directory / "version-1"
    calibration = str(federation.server_dir / "validation.npz")
    definition = "models.definitions.digits:definition"
    federation.fl_server("package", definition, "--calibration", calibration, "--out", str(version_dir))
    federation.fl_server("release", str(version_dir))
    federation.wait_until(lambda: federation.all_serve(1), "all devices to serve version 1")
    manifest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes())
    fetched = [MANIFEST_NAME, *(name for name in manifest.all_files if name != PARAMETERS_NAME)]
    return VersionRow(
        version=1,
        round=0,
        metric=float(manifest.quality.value) if manifest.quality else 0.0,
        epsilon=0.0,
        bytes_pushed=sum((version_dir / name).stat().st_size for name in fetched),
        promoted=True,
    )


def _train(federation: LocalFederation, options: DemoOptions) -> dict[str, Any]:
    """Train as an operator would, show the command's progress, and return its result."""
    plan = {"rounds": options.rounds, "epsilon": options.epsilon, "delta": DELTA, **TRAINING}
    flags = [text for name, value in plan.items() for text in (f"--{name}", str(value))]
    command, environment = federation.fl_server_command("train", "digits", "--json", *flags)
    result_path = federation.logs_dir / "train.json"
    with result_path.open("wb") as result:
        training = subprocess.Popen(command, env={**os.environ, **environment}, stdout=result)
    try:
        while training.poll() is None:
            federation.check_alive()
            time.sleep(0.2)
    finally:
        training.kill()
        training.wait()
    if training.returncode != 0:
        raise ServerError(f"the run failed; logs are in {federation.logs_dir}")
    document: dict[str, Any] = json.loads(result_path.read_bytes())
    return document


def _build_row(outcome: dict[str, Any]) -> VersionRow:
    return VersionRow(
        version=outcome["version"],
        round=outcome["round"],
        metric=float(outcome["value"]),
        epsilon=float(outcome["epsilon"]),
        bytes_pushed=outcome["bytes_pushed"] if outcome["promoted"] else 0,
        promoted=outcome["promoted"],
    )


def _measure_accuracy(client: Client, test: digits.Samples) -> float:
    """Return the share of `test` that the device behind `client` labels rightly, asked over HTTP."""
    logits = np.concatenate([client.infer(rows)[0] for rows in np.array_split(test.x, 6)])
    return float((logits.argmax(1) == test.y).mean())


class _MemoryWatch:
    """The largest resident memory of the agents and of their training processes, MB; a context."""

    def __init__(self, agent_pids: Sequence[int]) -> None:
        self.agent_mb = self.training_mb = 0.0
        self._agents = [psutil.Process(pid) for pid in agent_pids]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(MEMORY_INTERVAL_S):
            for agent in self._agents:
                with contextlib.suppress(psutil.Error):
                    self.agent_mb = max(self.agent_mb, agent.memory_info().rss / 1e6)
                    for child in agent.children():
                        self.training_mb = max(self.training_mb, child.memory_info().rss / 1e6)


def _clear(out_dir: Path) -> None:
    """Make `out_dir` an empty folder, if it does not exist, is empty, or holds an earlier demo."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out {out_dir} is not a folder")
    if out_dir.exists() and any(out_dir.iterdir()):
        if not (out_dir / MARK).exists():
            raise UsageError(f"--out {out_dir} holds something else; name a new folder")
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MARK).touch()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end_like_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
