"""1000 devices that fetch 1 MB at once: retained chunks from mosquitto, beside one file from nginx.

The devices are light, so that the servers are what is measured (`devices.py`); connections are open before the clock
starts. Both serve over TLS, as a fleet is served, and in the clear, where nginx lets the kernel send the file and never
touches a byte. nginx has a worker for each core. Without one only the broker is measured.
"""

import ipaddress
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fl_server.demo.processes import find_free_ports, find_mosquitto, find_nginx
from fl_server.errors import ServerError
from models.contract.encoding import build_digest
from models.contract.offer import split_chunks
from models.contract.topics import build_blob_topic
from tests.bench.versions import REPOSITORY
from tests.simulators.observer import Observer
from tests.simulators.waiting import wait_until

DEVICES, PROCESSES = 1000, 2
BLOB_BYTES = 1024 * 1024
TURNS = 3
FLEET = "bench"
_MOSQUITTO = """\
{user}
allow_anonymous true
set_tcp_nodelay true
max_packet_size 300000
max_inflight_messages 20
max_queued_messages 1000
max_queued_bytes 1048576
listener {clear} 127.0.0.1
listener {tls} 127.0.0.1
certfile {folder}/cert.pem
keyfile {folder}/key.pem
"""
_NGINX = """\
{user}
daemon off;
worker_processes auto;
worker_rlimit_nofile 4096;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  ssl_certificate {folder}/cert.pem;
  ssl_certificate_key {folder}/key.pem;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{clear} backlog=1024; listen 127.0.0.1:{tls} ssl backlog=1024; root {folder}; }}
}}
"""
_PORTS = ("clear", "tls")


def run() -> dict[str, float]:
    try:
        nginx = find_nginx()
    except ServerError as error:
        print(f"nothing to compare the broker with: {error}", file=sys.stderr)
        return {}
    blob, figures = os.urandom(BLOB_BYTES), dict[str, float]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _write_certificate(folder)
        (folder / "blob").write_bytes(blob)
        user = "user root" if os.geteuid() == 0 else ""  # else they drop to a user that may not read here
        command = [find_mosquitto(), "-c", str(folder / "mosquitto.conf")]
        broker = stack.enter_context(_serving(command, _MOSQUITTO, user, folder))
        topics = _publish(broker["clear"], blob)
        command = [nginx, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
        peer = stack.enter_context(_serving(command, _NGINX, f"{user};" if user else "", folder))
        for kind in _PORTS:
            ca = str(folder / "cert.pem") if kind == "tls" else None
            mine, theirs = list[float](), list[float]()
            for _ in range(TURNS):
                mine.append(measure({"protocol": "mqtt", "port": broker[kind], "topics": topics, "ca": ca}))
                theirs.append(measure({"protocol": "http", "port": peer[kind], "path": "/blob", "ca": ca}))
            figures[f"mosquitto_{kind}_s"] = statistics.median(mine)
            figures[f"nginx_{kind}_s"] = statistics.median(theirs)
            ratios = [first / second for first, second in zip(mine, theirs, strict=True)]
            figures[f"mosquitto_to_nginx_{kind}_ratio"] = statistics.median(ratios)
    return figures


def measure(job: Mapping[str, object]) -> float:
    """Return how many seconds it takes until all devices have every byte."""
    with ExitStack() as stack:
        processes = []
        for number in range(PROCESSES):
            share = {**job, "name": f"d{number}", "devices": DEVICES // PROCESSES, "size_bytes": BLOB_BYTES}
            command = [sys.executable, "-m", "tests.bench.devices", json.dumps(share)]
            process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.append(stack.enter_context(process))
        for process in processes:
            _expect(process, b"ready\n")
        started = time.monotonic()
        for process in processes:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            _expect(process, b"done\n")
        return time.monotonic() - started


@contextmanager
def _serving(command: list[str], config: str, user: str, folder: Path) -> Iterator[dict[str, int]]:
    """Run a server with `config`; yields its ports."""
    ports = dict(zip(_PORTS, find_free_ports(len(_PORTS)), strict=True))
    Path(command[-1]).write_text(config.format(folder=folder, user=user, **ports))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for port in ports.values():
                wait_until(lambda port=port: _answers(port), f"{command[0]} to listen")
            yield ports
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _publish(port: int, blob: bytes) -> list[str]:
    topics = []
    with Observer(port) as publisher:
        for index, chunk in enumerate(split_chunks(blob)):
            topics.append(build_blob_topic(FLEET, build_digest(blob), index))
            publisher.publish(topics[-1], chunk, retain=True)
    return topics


def _write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _expect(process: subprocess.Popen[bytes], line: bytes) -> None:
    if process.stdout.readline() != line:
        raise RuntimeError("the devices have failed")
