"""A fleet's telemetry: 1000 devices on one mosquitto say 1000 messages a second to one coordinator.

`coordinator_cpu_share` is of one core, without the SuperLink, which is a process of its own. All parts share this
machine's cores. The broker confirms what it has; that the coordinator has it, too, is asked of its database.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fl_server.fleet.roster import Roster
from tests.simulators.federation import FLEET, Federation, run_command
from tests.simulators.light_fleet import Fleet, Said, name_device
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
DEVICES = 1000
INTERVAL_S = 1.0
SECONDS = 25
WARM_UP_S = 3  # in which every device says its first status


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        done = run_command("init", str(directory / "template"), "--fleet", FLEET)
        assert done.returncode == 0, done.stderr
        with (
            Mosquitto(directory) as broker,
            Federation(directory / "federation", directory / "template", broker_port=broker.port) as federation,
        ):
            enroll(federation.directory / "coordinator.db")
            federation.start()
            federation.wait_for_log(f"{name_device(DEVICES - 1)} is node")
            return measure(federation, broker)


def enroll(path: Path) -> None:
    with Roster(path) as roster:
        for number in range(DEVICES):
            key = generate_private_key(SECP384R1()).public_key()
            with roster.enrolling(name_device(number), key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)):
                pass


def measure(federation: Federation, broker: Mosquitto) -> dict[str, float]:
    fleet = Fleet(port=broker.port, fleet=FLEET, devices=DEVICES, interval_s=INTERVAL_S, seconds=SECONDS)
    command = [sys.executable, "-m", "tests.simulators.light_fleet", json.dumps(asdict(fleet))]
    assert federation.process is not None
    coordinator = psutil.Process(federation.process.pid)
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        assert psutil.Process(process.pid).is_running()
        psutil.cpu_percent(WARM_UP_S)  # waits
        before = coordinator.cpu_times()
        psutil.cpu_percent(SECONDS - 2 * WARM_UP_S)
        after = coordinator.cpu_times()
        said = Said(**json.loads(process.stdout.readline()))
    wait_until(lambda: find_oldest(federation) >= SECONDS / INTERVAL_S - 2, "the last telemetry of every device")
    return {
        "telemetry_messages_per_s": (said.confirmed - DEVICES) / SECONDS,
        "coordinator_cpu_share": (after.user + after.system - before.user - before.system) / (SECONDS - 2 * WARM_UP_S),
        "coordinator_resident_mb": coordinator.memory_info().rss / 1e6,
        "unconfirmed_messages": said.sent - said.confirmed,
        "load_generator_cpu_share": said.cpu_share,
    }


def find_oldest(federation: Federation) -> float:
    """Return the smallest last number that the coordinator has of any device; -1 if it has none of one."""
    with Roster(federation.directory / "coordinator.db") as roster:
        lasts = [device.telemetry.uptime_s if device.telemetry else -1 for device in roster.list_devices()]
    return min(lasts)
