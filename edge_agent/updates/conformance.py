"""The command line that the TUF conformance suite drives: `python -m edge_agent.updates.conformance`.

    --metadata-dir DIR init ROOT
    --metadata-dir DIR --metadata-url URL refresh
    --metadata-dir DIR --metadata-url URL --target-name PATH … --target-base-url URL --target-dir DIR download

A test aid (https://github.com/theupdateframework/tuf-conformance), which no device runs. With CONFORMANCE_TRANSPORT=mqtt
it starts a mosquitto, publishes what the suite serves as a coordinator would, in offers and chunks, and reads that back
as a device does. What is trusted goes to DIR step by step, as the suite looks for it there.
"""

import argparse
import asyncio
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from edge_agent.errors import AgentError, StalledError
from edge_agent.link.mqtt import Broker, Link, Publication
from edge_agent.updates.blobs import BlobStore
from edge_agent.updates.fetcher import OFFER_URL, OfferFetcher
from models.contract.encoding import build_digest
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.manifest import FileEntry
from models.contract.offer import build_offer, parse_offer, split_chunks
from models.contract.topics import build_blob_topic, build_offer_topic

TRANSPORT_VARIABLE = "CONFORMANCE_TRANSPORT"
FLEET = "conformance"
DEADLINE_S = 60.0  # of one command, all of its files together
_READ_BYTES = 64 * 1024


class HttpFetcher(FetcherInterface):
    """Reads from an HTTP server; everything it fetches shares one deadline, which no slow drip outlives."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._ends_at = time.monotonic() + deadline_s

    def _fetch(self, url: str) -> Iterator[bytes]:
        if not url.startswith(("http://", "https://")):
            raise DownloadError(f"{url} is no HTTP address")
        try:
            response = urllib.request.urlopen(url, timeout=self._get_left_s())  # noqa: S310 - HTTP, see above
        except urllib.error.HTTPError as error:
            error.close()
            raise DownloadHTTPError(f"{url}: {error.reason}", error.code) from error
        return self._read(url, response)

    def _read(self, url: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
        with response:
            try:
                while data := response.read1(_READ_BYTES):
                    yield data
                    self._get_left_s()
            except (OSError, http.client.HTTPException) as error:  # ngclient wraps no error of an iterator
                raise DownloadError(f"{url}: {error}") from error

    def _get_left_s(self) -> float:
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise DownloadError(f"not complete within {self._deadline_s:g} s")
        return left_s


class Exchange:
    """A fleet of one over a broker on loopback: one connection publishes as the coordinator and reads as the device."""

    def __init__(self, port: int, directory: Path) -> None:
        self._runner = asyncio.Runner()
        self._connected = asyncio.Event()
        self._link = Link(
            Broker(host="127.0.0.1", port=port, client_id=FLEET, keepalive_s=30),
            build_will=lambda: Publication(topic=f"{FLEET}/gone", payload=b"{}"),
            on_message=lambda _topic, _payload: None,
            on_connected=self._connected.set,
        )
        self._blobs = BlobStore(directory, reader=self._link, fleet=FLEET)
        self._running = self._runner.get_loop().create_task(self._link.run())
        self._runner.run(asyncio.wait_for(self._connected.wait(), DEADLINE_S))

    def close(self) -> None:
        self._runner.close()

    def exchange_offer(self, metadata: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return what a device reads from the offer of `metadata`."""
        topic = build_offer_topic(FLEET)
        self._publish(topic, build_offer(metadata))
        payload = self._runner.run(self._link.read(topic, DEADLINE_S))
        if payload is None:
            raise StalledError("the broker did not pass the offer on")
        return parse_offer(payload)

    def exchange_blob(self, entry: FileEntry, data: bytes) -> bytes:
        """Return what a device makes of `data`, published as the blob that `entry` is."""
        for index, chunk in enumerate(split_chunks(data)):
            self._publish(build_blob_topic(FLEET, entry.digest, index), chunk)
        self._runner.run(self._blobs.fetch(entry))
        return b"".join(self._blobs.read(entry))

    def _publish(self, topic: str, payload: bytes) -> None:
        self._runner.run(self._hand_over(Publication(topic=topic, payload=payload, retain=True)))

    async def _hand_over(self, publication: Publication) -> None:
        if not self._link.publish(publication):
            raise StalledError("the broker is away")


class BrokerFetcher(FetcherInterface):
    """Whatever is asked for is taken from the suite, published, and fetched from the broker.

    Attributes:
        signed: The target that is fetched next.
    """

    def __init__(self, suite: FetcherInterface, metadata_url: str, exchange: Exchange) -> None:
        self._suite, self._metadata_url, self._exchange = suite, metadata_url, exchange
        self._metadata: dict[str, bytes] = {}
        self.signed: TargetFile | None = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        if self.signed is not None:
            return iter((self._fetch_target(url, self.signed),))
        name = url.removeprefix(self._metadata_url)
        self._metadata.pop(name, None)
        with suppress(DownloadHTTPError):  # then the offer will not hold it
            self._metadata[name] = b"".join(self._suite.fetch(url))
        return OfferFetcher(self._exchange.exchange_offer(self._metadata)).fetch(OFFER_URL + name)

    def _fetch_target(self, url: str, signed: TargetFile) -> bytes:
        data = b"".join(self._suite.fetch(url))
        digest = signed.hashes.get("sha256") or build_digest(data)  # where another hash is signed, ngclient checks it
        return self._exchange.exchange_blob(FileEntry(digest=digest, size_bytes=signed.length), data)


@contextmanager
def running_broker() -> Iterator[int]:
    """Start a mosquitto that only this machine reaches and that keeps nothing; yield its port.

    Raises:
        StalledError: It cannot be started.
    """
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise StalledError("mosquitto is not installed; the MQTT transport needs it")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    process = subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends_at = time.monotonic() + DEADLINE_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > ends_at:
                raise StalledError(f"mosquitto does not listen on port {port}")
            time.sleep(0.01)
        yield port
    finally:
        process.kill()
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one command of the suite; return 0 if all of it succeeded, 1 if not."""
    parsed = _build_parser().parse_args(arguments)
    try:
        if parsed.command == "init":
            parsed.metadata_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(parsed.trusted_root, parsed.metadata_dir / "root.json")
        else:
            _update(parsed)
    except (RepositoryError, DownloadError, AgentError, ContractError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _update(parsed: argparse.Namespace) -> None:
    metadata_url = f"{parsed.metadata_url.rstrip('/')}/"
    with ExitStack() as stack:
        scratch_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fetcher: FetcherInterface = HttpFetcher()
        if os.environ.get(TRANSPORT_VARIABLE, "http") == "mqtt":
            exchange = Exchange(stack.enter_context(running_broker()), scratch_dir / "blobs")
            stack.callback(exchange.close)
            fetcher = BrokerFetcher(fetcher, metadata_url, exchange)
        updater = Updater(
            str(parsed.metadata_dir),
            metadata_url,
            target_base_url=parsed.target_base_url,
            fetcher=fetcher,
            bootstrap=None,
        )
        updater.refresh()
        if parsed.command == "download":
            for name in parsed.target_name:
                _download(updater, fetcher, name, parsed.target_dir / quote(name, ""), scratch_dir / "staged")


def _download(updater: Updater, fetcher: FetcherInterface, name: str, path: Path, staged_path: Path) -> None:
    target = updater.get_targetinfo(name)
    if target is None:
        raise StalledError(f"no role signs {name}")
    if updater.find_cached_target(target, str(path)) is not None:
        return
    if isinstance(fetcher, BrokerFetcher):
        fetcher.signed = target
    updater.download_target(target, str(staged_path))
    if isinstance(fetcher, BrokerFetcher):
        fetcher.signed = None
    save_atomically(path, staged_path.read_bytes())


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edge_agent.updates.conformance", description=(__doc__ or "").split("\n")[0]
    )
    add = partial(parser.add_argument, metavar="X")
    add("--metadata-dir", type=Path, required=True, help="where what is trusted is kept")
    add("--metadata-url", default="", help="where metadata is served")
    add("--target-name", action="append", default=[], help="what to download; may be given several times")
    add("--target-base-url", help="where targets are served")
    add("--target-dir", type=Path, help="where targets go once they verify")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="trust a root").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh", help="bring the metadata up to date")
    commands.add_parser("download", help="the same, then fetch the targets")
    return parser


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
