"""A real SuperLink on a free loopback port, real node processes, and the real driver, all ended by pid."""

import os
import queue
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fl_server.rounds.events import Event, parse_event
from fl_server.rounds.flower import register_nodes
from fl_server.rounds.rule import MEAN, Aggregation
from fl_server.rounds.run import RunSpec, create_run
from fl_server.rounds.superlink_command import superlink_command
from models.contract.identity import Identity
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit, Uplink
from models.tensors.layout import Layout

WAIT_S = 60.0
NODE_PROGRAM = Path(__file__).with_name("node.py")


def wait_until(condition: Callable[[], object], *, timeout_s: float = WAIT_S, what: str = "the condition") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(0.05)


@dataclass(kw_only=True)
class SuperLink:
    """Started and killed at will; keeps its port and its database."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    node_keys: dict[str, Path] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ca_path(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def secret_path(self) -> Path:
        return self.directory / "secret"

    def start(self) -> None:
        command = superlink_command(
            host="127.0.0.1",
            port=self.port,
            database_path=self.directory / "flwr.db",
            ca_path=self.ca_path,
            certificate_path=self.directory / "superlink.pem",
            key_path=self.directory / "superlink.key.pem",
            superexec_secret_path=self.secret_path,
        )
        with (self.directory / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen(
                command.arguments, stdout=log, stderr=log, env={**os.environ, **command.environment}
            )
        wait_until(self._answers, what="the SuperLink")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def create_key(self, device_id: str) -> bytes:
        """Return the public key of a new device; its private key is in `node_keys`."""
        key = ec.generate_private_key(ec.SECP384R1())
        path = self.directory / f"{device_id}.key"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        self.node_keys[device_id] = path
        return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

    def register(self, *device_ids: str) -> dict[str, int]:
        return register_nodes(self.address, self.ca_path, {name: self.create_key(name) for name in device_ids})

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "superlink.log").read_text()
        context = ssl.create_default_context(cafile=self.ca_path)
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as plain:
                context.wrap_socket(plain, server_hostname="127.0.0.1").close()
        except OSError:
            return False
        return True


@contextmanager
def running_superlink(directory: Path) -> Iterator[SuperLink]:
    directory.mkdir()
    _write_certificates(directory)
    (directory / "secret").write_text("0123456789abcdef" * 4)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    superlink = SuperLink(directory=directory, port=port)
    superlink.start()
    try:
        yield superlink
    finally:
        superlink.kill()


def _write_certificates(directory: Path) -> None:
    now = datetime.now(UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])

    def build(subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, is_ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )

    ca = build(authority, authority_key.public_key(), is_ca=True).sign(authority_key, hashes.SHA256())
    server = (
        build(x509.Name([]), key.public_key(), is_ca=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1")), x509.DNSName("localhost")]),
            critical=True,
        )
        .sign(authority_key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (directory / "superlink.pem").write_bytes(server.public_bytes(Encoding.PEM))
    (directory / "superlink.key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


class Process:
    """A child process whose lines on stdout are kept."""

    def __init__(self, arguments: list[str], log_path: Path, **environment: str) -> None:
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
            )
        self.log_path = log_path
        self.lines: list[bytes] = []
        self._queue: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def next_line(self, timeout_s: float = WAIT_S) -> bytes:
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no line within {timeout_s:g} s; stderr: {self.log_path.read_text()}") from None

    def wait(self, timeout_s: float = WAIT_S) -> int:
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.terminate()
        self.process.wait(WAIT_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._queue.put(line)


SAMPLE_PLAN = PrivacyPlan(
    unit=Unit.SAMPLE,
    clipping_norm=Decimal(1),
    noise_multiplier=Decimal(1),
    sampling_rate=Decimal("0.1"),
    delta=Decimal("0.001"),
    epsilon=Decimal(8),
)


class Fleet:
    """A SuperLink with nodes and drivers; ends whatever it started."""

    def __init__(self, superlink: SuperLink, directory: Path) -> None:
        self.superlink, self.directory = superlink, directory
        self._processes: list[Process] = []

    def start_node(
        self,
        device_id: str,
        *,
        behaviour: str = "one",
        poll_s: float = 0.2,
        idle_timeout_s: float = 120,
        key: str = "",
        address: str = "",
        identity: Identity | None = None,
    ) -> Process:
        """Start a node that adds its behaviour's update; see node.py beside this file.

        It dials the SuperLink, or the proxy at `address` with `identity`.
        """
        return self._start(
            [
                str(NODE_PROGRAM),
                address or self.superlink.address,
                str(self.superlink.ca_path),
                str(self.superlink.node_keys[key or device_id]),
                str(poll_s),
                str(idle_timeout_s),
                behaviour,
                str(self.directory / f"{device_id}.release"),
                *([] if identity is None else [str(identity.cert_path), str(identity.key_path)]),
            ],
            self.directory / f"{device_id}.log",
        )

    def release(self, device_id: str) -> None:
        """Let a node that holds its answers back send them."""
        (self.directory / f"{device_id}.release").touch()

    def start_driver(self, run_dir: Path) -> "DriverProcess":
        driver = DriverProcess(["-m", "fl_server.rounds", str(run_dir)], run_dir / "driver.log")
        self._processes.append(driver)
        return driver

    def create_run(
        self,
        devices: dict[str, int],
        *,
        name: str = "run-1",
        size: int = 10,
        rounds: int = 3,
        quorum: int | None = None,
        deadline_s: float = 30,
        join_timeout_s: float = 30,
        uplink: Uplink = "float32",
        aggregation: Aggregation = MEAN,
        privacy: PrivacyPlan = SAMPLE_PLAN,
    ) -> Path:
        """Return the folder of a new run that starts with zeros."""
        run_dir = self.directory / name
        run_dir.mkdir()
        key_path = run_dir / "orders.pem"
        key_path.write_bytes(
            Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        spec = RunSpec(
            fleet="demo",
            model="digits",
            run=name,
            graph_digest="0" * 64,
            layout=Layout(names=("weight",), shapes=((size,),)),
            privacy=privacy,
            training=TrainingPlan(
                rounds=rounds,
                steps=1,
                expected_batch=Decimal(8),
                learning_rate=Decimal("0.1"),
                uplink=uplink,
            ),
            devices=devices,
            quorum=len(devices) if quorum is None else quorum,
            deadline_s=deadline_s,
            join_timeout_s=join_timeout_s,
            superlink=self.superlink.address,
            ca_path=str(self.superlink.ca_path),
            superexec_secret_path=str(self.superlink.secret_path),
            order_key_path=str(key_path),
            update_norm_limit=Decimal(1000),
            aggregation=aggregation,
        )
        create_run(run_dir, spec, np.zeros(size, np.float32))
        return run_dir

    def close(self) -> None:
        for process in self._processes:
            process.kill()

    def _start(self, arguments: list[str], log_path: Path) -> Process:
        process = Process(arguments, log_path)
        self._processes.append(process)
        return process


class DriverProcess(Process):
    """`python -m fl_server.rounds RUN_DIR`."""

    def next_event(self, timeout_s: float = WAIT_S) -> Event:
        return parse_event(self.next_line(timeout_s))

    def run_to_end(self, timeout_s: float = WAIT_S) -> list[Event]:
        """Return all events up to the end of the process, with "continue" after every round."""
        events = []
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None or not self._queue.empty():
            try:
                event = parse_event(self._queue.get(timeout=0.1))
            except queue.Empty:
                assert time.monotonic() < deadline, f"{events} {self.log_path.read_text()}"
                continue
            events.append(event)
            if event.event == "round" and self.process.poll() is None:
                self._say_if_alive("continue")
        return events

    def _say_if_alive(self, word: str) -> None:
        try:
            self.say(word)
        except BrokenPipeError:
            return


@contextmanager
def running_fleet(directory: Path) -> Iterator[Fleet]:
    with running_superlink(directory / "superlink") as superlink:
        fleet = Fleet(superlink, directory)
        try:
            yield fleet
        finally:
            fleet.close()
