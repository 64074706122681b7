"""The real nginx with the configuration that `fl-server init` writes, and the coordinator's enrolment behind it."""

import asyncio
import datetime as dt
import os
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fl_server.authority import Authority, encode, encode_key, save_secret
from fl_server.config import ProxySettings, ServerSettings, SuperLinkSettings
from fl_server.console.http import answering
from fl_server.demo.processes import find_free_ports, find_nginx
from fl_server.directory import Directory
from fl_server.enrolment_desk import EnrolmentDesk, build_server_context
from fl_server.errors import ServerError
from fl_server.fleet.enrolment import Federation
from fl_server.fleet.roster import Roster
from fl_server.proxy.files import save_proxy_files
from models.contract.floors import Floors
from models.contract.identity import Identity
from tests.simulators.waiting import wait_until


class Proxy:
    """nginx for a federation's folder; a context that ends it."""

    def __init__(self, directory: Directory, settings: ServerSettings) -> None:
        """Write the configuration into the federation's folder, where an authority is already."""
        self.directory, self.settings = directory, settings
        self.authority = Authority(directory.ca_dir)
        save_proxy_files(directory.proxy_dir, settings)
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a federation of an authority and a proxy in the new folder `path`."""
        path.mkdir()
        superlink, port, enrolment_port, coordinator_port = find_free_ports(4)
        settings = ServerSettings(
            fleet="demo",
            superlink=SuperLinkSettings(port=superlink),
            proxy=ProxySettings(port=port, enrolment_port=enrolment_port, coordinator_port=coordinator_port),
        )
        authority = Authority.create(Directory(path).ca_dir, fleet="demo")
        authority.issue_servers(["127.0.0.1", "localhost"])
        authority.save_crl([])
        return cls(Directory(path), settings)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        try:
            program = find_nginx()
        except ServerError as error:
            pytest.skip(str(error))
        command = [program, "-e", "stderr", "-p", f"{self.directory.path}", "-c", "proxy/nginx.conf"]
        log_path = self.directory.path / "nginx.log"
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self.pid_path.exists, f"nginx; {log_path}", timeout_s=20)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    @property
    def pid_path(self) -> Path:
        return self.directory.proxy_dir / "nginx.pid"

    def reload(self) -> None:
        os.kill(int(self.pid_path.read_text()), signal.SIGHUP)

    def create_identity(self, device_id: str, authority: Authority | None = None) -> tuple[Identity, int]:
        """Return certificate and key of a device, and the certificate's serial number."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (authority or self.authority).issue_device(device_id, key.public_key())
        folder = self.directory.path / f"{device_id}-{certificate.serial_number}"
        folder.mkdir()
        (folder / "device.pem").write_bytes(encode(certificate))
        save_secret(folder / "device.key", encode_key(key))
        identity = Identity(
            ca_path=self.directory.ca_path, cert_path=folder / "device.pem", key_path=folder / "device.key"
        )
        return identity, certificate.serial_number

    def connect(self, identity: Identity | None, *, port: int | None = None) -> HTTPSConnection:
        context = ssl.create_default_context(cafile=self.directory.ca_path)
        if identity is not None:
            context.load_cert_chain(identity.cert_path, identity.key_path)
        return HTTPSConnection("127.0.0.1", port or self.settings.proxy.port, context=context, timeout=20)

    def ask(self, path: str, identity: Identity | None, *, method: str = "POST", port: int | None = None) -> int:
        """Return the HTTP status of one request."""
        connection = self.connect(identity, port=port)
        try:
            connection.request(method, path, b"")
            return connection.getresponse().status
        finally:
            connection.close()

    @property
    def federation(self) -> Federation:
        return Federation(
            fleet="demo",
            broker_host="127.0.0.1",
            broker_port=8883,
            broker_tls=True,
            superlink=self.settings.fleet_address,
            renewal=self.settings.fleet_address,
            ca=self.directory.ca_path.read_bytes(),
            tuf_root=b'{"signed": {}}',
            floors=Floors(roles={}, signed_at=dt.datetime.now(dt.UTC)),
        )


@contextmanager
def running_desk(proxy: Proxy) -> Iterator[None]:
    """The coordinator's enrolment, on a loop of its own."""
    started, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        with Roster(proxy.directory.database_path) as roster:
            desk = EnrolmentDesk(roster, proxy.authority, lambda: proxy.federation)
            port, context = proxy.settings.proxy.coordinator_port, build_server_context(proxy.directory)
            async with answering(port, context, desk.decide):
                started.set()
                await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20)
    try:
        yield
    finally:
        ended.set()
        thread.join(20)


def issue_old(proxy: Proxy, identity: Identity, *, days_left: int) -> x509.Certificate:
    """Replace the device's certificate by one whose year ends in `days_left`, with the same key."""
    present = x509.load_pem_x509_certificate(identity.cert_path.read_bytes())
    shift = present.not_valid_after_utc.timestamp() - (time.time() + days_left * 86_400)
    moved = [end.timestamp() - shift for end in (present.not_valid_before_utc, present.not_valid_after_utc)]
    begins, ends = (dt.datetime.fromtimestamp(moment, dt.UTC) for moment in moved)
    builder = x509.CertificateBuilder(
        issuer_name=present.issuer,
        subject_name=present.subject,
        public_key=present.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=begins,
        not_valid_after=ends,
        extensions=list(present.extensions),
    )
    old = builder.sign(proxy.authority._key, hashes.SHA256())
    identity.cert_path.write_bytes(old.public_bytes(Encoding.PEM))
    return old
