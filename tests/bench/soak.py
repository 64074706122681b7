"""A federation under random kills, for as long as it is asked: `python -m tests.bench.soak --minutes 30 --out soak.json`.

Broker, coordinator, SuperLink and devices are killed as a power cut would; coordinator, broker and devices are started
again as systemd does, the SuperLink by its coordinator. Runs follow one on the other, a client asks every device all the
while, and one device is never killed: what it takes of memory is what a device takes. What `check` finds must hold in the end.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from edge_agent.training.ledger import open_ledger
from edge_agent.updates.slots import Slots
from fl_server.demo.federation import LocalDevice, LocalFederation
from fl_server.demo.load import Answer, Client, LoadGenerator
from fl_server.directory import Directory
from fl_server.fleet.roster import Roster
from models.contract.ledger import find_missing
from models.definitions import digits

MODEL, DEFINITION = "digits", "models.definitions.digits:definition"
REQUESTS_PER_S = 50.0
PAUSE_S = (4.0, 15.0)  # between two kills
DOWN_S = (0.2, 3.0)
WARM_S = 300.0  # memory counts from then on, or from a third of a shorter soak
GROWTH_LIMIT = 0.05
SETTLE_S = 120.0
KINDS = ("device", "device", "broker", "superlink", "coordinator")
RUN = ("--rounds", "4", "--epsilon", "2", "--delta", "0.001", "--steps", "20", "--learning-rate", "0.35")


class Watch:
    """Notes what every device still has to tell, what it takes of memory, and when it is down."""

    def __init__(self, federation: LocalFederation) -> None:
        self.told: dict[str, set[str]] = defaultdict(set)  # ids of events, by device
        self.memory: dict[str, list[tuple[float, float]]] = defaultdict(list)  # time, MB, by process
        self.down: dict[int, list[list[float]]] = defaultdict(list)  # from, until, by number of device
        self._federation = federation
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def read_pending(self, device: LocalDevice) -> set[str]:
        """Return the ids of the events that the device has not had acknowledged."""
        path = get_state_dir(device) / "outbox.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as outbox:
            return {name for (name,) in outbox.execute("SELECT id FROM events")}

    def _run(self) -> None:
        turn = 0
        while not self._stop.wait(0.1):
            for device in self._federation.devices:
                with suppress(sqlite3.Error):  # being made, or killed
                    self.told[device.device_id] |= self.read_pending(device)
            if (turn := turn + 1) % 20 == 0:
                self._measure()

    def _measure(self) -> None:
        children = {device.device_id: device.agent for device in self._federation.devices}
        children["coordinator"] = self._federation.coordinator
        for name, child in children.items():
            with suppress(psutil.Error, AttributeError):
                self.memory[name].append((time.time(), psutil.Process(child.pid).memory_info().rss / 1e6))


class Soak:
    """One federation, and what is done to it."""

    def __init__(self, federation: LocalFederation, watch: Watch, rng: random.Random) -> None:
        self.federation, self.watch = federation, watch
        self.kills: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self._rng = rng
        self._training: subprocess.Popen[bytes] | None = None

    def go_on(self, ends_s: float) -> None:
        """Kill one process after the other until `ends_s`, and let a run follow each run."""
        while time.time() < ends_s:
            self._keep_training()
            kind = self._rng.choice(KINDS)
            getattr(self, f"_kill_{kind}")()
            self.kills[kind] += 1
            until = min(ends_s, time.time() + self._rng.uniform(*PAUSE_S))
            while time.time() < until:
                self._keep_training()
                time.sleep(0.2)

    def settle(self) -> bool:
        """Return whether the last run ended and every device has told all, in time."""

        def is_quiet() -> bool:
            is_over = self._training is None or self._training.poll() is not None
            return is_over and not any(self.watch.read_pending(device) for device in self.federation.devices)

        ends = time.monotonic() + SETTLE_S
        while not is_quiet() and time.monotonic() < ends:
            time.sleep(0.5)
        is_settled = is_quiet()
        if self._training is not None:
            self._count_run()
        return is_settled

    def _keep_training(self) -> None:
        if self._training is not None:
            if self._training.poll() is None:
                return
            self._count_run()
        command, environment = self.federation.fl_server_command("train", MODEL, "--json", *RUN)
        self._training = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _count_run(self) -> None:
        assert self._training is not None
        code = self._training.poll()
        if code is None:
            self._training.kill()
            self._training.wait()
        self.runs["done" if code == 0 else "cut off" if code is None else "failed"] += 1
        self._training = None

    def _kill_device(self) -> None:
        number = self._rng.randrange(1, len(self.federation.devices))  # the first is never killed
        device = self.federation.devices[number]
        assert device.agent is not None
        downtime = [time.time(), float("inf")]
        self.watch.down[number].append(downtime)
        device.agent.kill()
        time.sleep(self._rng.uniform(*DOWN_S))
        device.start()
        wait_for(lambda: device.get_version(MODEL) is not None, f"{device.device_id} to serve again")
        downtime[1] = time.time()

    def _kill_broker(self) -> None:
        assert self.federation.broker is not None
        self.federation.broker.kill()
        time.sleep(self._rng.uniform(*DOWN_S))
        self.federation.start_broker()

    def _kill_superlink(self) -> None:
        assert self.federation.coordinator is not None
        with suppress(psutil.Error):
            for child in psutil.Process(self.federation.coordinator.pid).children():
                if any("flower-superlink" in word for word in child.cmdline()):
                    child.kill()

    def _kill_coordinator(self) -> None:
        assert self.federation.coordinator is not None
        self.federation.coordinator.kill()
        time.sleep(self._rng.uniform(*DOWN_S))
        self.federation.start_coordinator()


def check(soak: Soak, answers: list[Answer], *, began_s: float, is_settled: bool) -> tuple[list[str], dict[str, float]]:
    """Return what does not hold, one line each, and the growth of memory of each process; all processes have ended."""
    wrong = [] if is_settled else [f"not quiet {SETTLE_S:.0f} s after the last kill: a run goes on, or events wait"]
    wrong += list(find_failed(answers, soak.watch.down))
    with Roster(Directory(soak.federation.server_dir).database_path) as roster:
        for device in soak.federation.devices:
            wrong += check_device(soak.watch, device, roster)
    growth = {name: measure_growth(samples, began_s) for name, samples in soak.watch.memory.items()}
    witness = soak.federation.devices[0].device_id
    if growth[witness] > GROWTH_LIMIT:
        wrong.append(f"{witness}, never killed, has grown by {growth[witness]:.1%}")
    return wrong, growth


def check_device(watch: Watch, device: LocalDevice, roster: Roster) -> Iterator[str]:
    """Yield what does not hold for a device: events, ledger, slots."""
    name, state_dir = device.device_id, get_state_dir(device)
    heard = {event.id for event in roster.list_events(name)}
    if lost := watch.told[name] - heard - watch.read_pending(device):
        yield f"{name}: {len(lost)} events are acknowledged, and the coordinator has them not"
    with closing(open_ledger(state_dir / "training" / "ledger.jsonl")) as ledger:
        if missing := find_missing(roster.get_ledger(name).spent, ledger.head.spent):
            yield f"{name}: the coordinator knows of steps that the ledger has not charged: {missing}"
    slots = Slots(state_dir / "slots")
    if slots.active is None or slots.damage:
        yield f"{name}: the active slot does not verify: {slots.damage}"


def find_failed(answers: list[Answer], down: dict[int, list[list[float]]]) -> Iterator[str]:
    """Yield each request that failed while its device was not killed."""
    for answer in answers:
        if answer.version is None:
            until = answer.at_s + answer.latency_ms / 1000
            if not any(answer.at_s <= back and until >= gone for gone, back in down[answer.device]):
                yield f"device {answer.device + 1}: a request failed at {answer.at_s:.1f}, and the device was up"


def measure_growth(samples: list[tuple[float, float]], began_s: float) -> float:
    """Return by which share the last quarter of `samples` lies above the first, once the process was warm."""
    warm_s = min(WARM_S, (samples[-1][0] - began_s) / 3)
    values = [mb for at_s, mb in samples if at_s >= began_s + warm_s]
    quarter = max(1, len(values) // 4)
    return median(values[-quarter:]) / median(values[:quarter]) - 1


def get_state_dir(device: LocalDevice) -> Path:
    return device.config_path.parent / "state"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > ends:
            raise SystemExit(f"soak: after {SETTLE_S:.0f} s still waiting for {what}")
        time.sleep(0.1)


def run(directory: Path, *, minutes: float, devices: int, seed: int) -> dict[str, Any]:
    """Return the report of a soak; everything lies below `directory`, which is new."""
    splits = digits.load_splits(devices, seed)
    os.environ["EDGE_AGENT_PRIVACY__EPSILON_LIMIT"] = "1000"  # the owner's limit is no part of this
    with ExitStack() as stack:
        federation = LocalFederation(
            directory, definition=DEFINITION, model=MODEL, validation=(splits.validation.x, splits.validation.y)
        )
        stack.enter_context(federation)
        federation.start_broker()
        federation.enroll(devices)
        federation.start_coordinator()
        federation.start_devices()
        for device, samples in zip(federation.devices, splits.devices, strict=True):
            wait_for(device.socket_path.exists, f"the socket of {device.device_id}")
            device.ingest(samples.x, samples.y)
        federation.fl_server("package", DEFINITION, "--out", str(directory / "v1"))
        federation.fl_server("release", str(directory / "v1"))
        wait_for(lambda: federation.all_serve(1), "all devices to serve version 1")
        watch, began_s = Watch(federation), time.time()
        soak = Soak(federation, watch, random.Random(seed))
        with watch.watching():
            clients = [Client(device.port, MODEL, "image") for device in federation.devices]
            load = LoadGenerator(clients, splits.test.x, requests_per_s=REQUESTS_PER_S)
            soak.go_on(began_s + 60 * minutes)
            is_settled = soak.settle()
            load.close()
    wrong, growth = check(soak, load.answers, began_s=began_s, is_settled=is_settled)
    failed = sum(answer.version is None for answer in load.answers)
    return {
        "minutes": round((time.time() - began_s) / 60, 2),
        "devices": devices,
        "seed": seed,
        "kills": dict(soak.kills),
        "runs": dict(soak.runs),
        "versions_served": len({answer.version for answer in load.answers} - {None}),
        "requests": len(load.answers),
        "requests_failed_while_killed": failed - sum("request failed" in line for line in wrong),
        "latency_p99_ms": float(np.quantile([each.latency_ms for each in load.answers if each.version], 0.99)),
        "events": sum(map(len, watch.told.values())),
        "memory_growth": {name: round(share, 4) for name, share in growth.items()},
        "wrong": wrong,
    }


def main() -> int:
    """Return 0, or 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="edge-fl-soak-"))
    report = run(directory, minutes=arguments.minutes, devices=arguments.devices, seed=arguments.seed)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if report["wrong"]:
        print(f"soak: {len(report['wrong'])} things do not hold; what is left of it: {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
