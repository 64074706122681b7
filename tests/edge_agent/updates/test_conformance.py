"""The door of the TUF conformance suite, over HTTP and over a real mosquitto, against a repository on a web server."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_agent.updates.conformance import TRANSPORT_VARIABLE, HttpFetcher, main
from models.contract.offer import CHUNK_MAX_BYTES

EXPIRES = datetime(2100, 1, 1, tzinfo=UTC)
ROLE = "odd/role?"  # its file name is quoted
ARTIFACT = bytes(range(256)) * (3 * CHUNK_MAX_BYTES // 256) + b"end"


class Repository:
    """A TUF repository in a folder that a web server serves; one key signs all of it."""

    def __init__(self, path: Path) -> None:
        self.metadata_dir, self.targets_dir = path / "metadata", path / "targets"
        self.metadata_dir.mkdir(parents=True)
        self.targets_dir.mkdir()
        self._signer, self.version = CryptoSigner.generate_ed25519(), 0
        self.root = Root(consistent_snapshot=True, expires=EXPIRES)
        for role in ("root", "timestamp", "snapshot", "targets"):
            self.root.add_key(self._signer.public_key, role)
        self.save(self.root, "1.root.json", self._signer)

    def release(self, data: bytes, *, hashes: list[str], signed_by: CryptoSigner | None = None) -> None:
        """Publish version n + 1 of everything below the root, with `data` as the target "some/file"."""
        self.version += 1
        target = TargetFile.from_data("some/file", data, hashes)
        for digest in target.hashes.values():
            (self.targets_dir / "some").mkdir(exist_ok=True)
            (self.targets_dir / "some" / f"{digest}.file").write_bytes(data)
        key = self._signer.public_key
        delegated = DelegatedRole(ROLE, [key.keyid], threshold=1, terminating=True, paths=["some/*"])
        top = Targets(
            version=self.version, expires=EXPIRES, delegations=Delegations({key.keyid: key}, {ROLE: delegated})
        )
        odd = Targets(version=self.version, expires=EXPIRES, targets={target.path: target})
        meta = {"targets.json": MetaFile(self.version), f"{ROLE}.json": MetaFile(self.version)}
        self.save(odd, f"{self.version}.odd%2Frole%3F.json", self._signer)
        self.save(top, f"{self.version}.targets.json", self._signer)
        snapshot = Snapshot(version=self.version, expires=EXPIRES, meta=meta)
        self.save(snapshot, f"{self.version}.snapshot.json", self._signer)
        timestamp = Timestamp(version=self.version, expires=EXPIRES, snapshot_meta=MetaFile(self.version))
        self.save(timestamp, "timestamp.json", signed_by or self._signer)

    def save(self, signed: Root | Targets | Snapshot | Timestamp, name: str, signer: CryptoSigner) -> None:
        metadata = Metadata(signed)
        metadata.sign(signer)
        (self.metadata_dir / name).write_bytes(metadata.to_bytes())


class Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        return f"{self.directory}{path}"  # names stay quoted

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "www")


@pytest.fixture
def url(tmp_path: Path, repository: Repository) -> Iterator[str]:
    yield from serve(functools.partial(Handler, directory=str(tmp_path / "www")))


def serve(handler: object) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("transport", ["http", "mqtt"])
def test_door_does_what_the_suite_asks_over_both_transports(
    tmp_path: Path, repository: Repository, url: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRANSPORT_VARIABLE, transport)
    trusted_dir, target_dir = tmp_path / "trusted", tmp_path / "targets"
    target_dir.mkdir()
    target_path = target_dir / "some%2Ffile"
    where = ("--metadata-dir", str(trusted_dir), "--metadata-url", f"{url}/metadata")
    what = ("--target-name", "some/file", "--target-base-url", f"{url}/targets/", "--target-dir", str(target_dir))

    def read_version(role: str) -> int:
        return json.loads((trusted_dir / f"{role}.json").read_bytes())["signed"]["version"]

    assert main(["--metadata-dir", str(trusted_dir), "init", str(repository.metadata_dir / "1.root.json")]) == 0
    assert main([*where, "refresh"]) == 1  # a true 404
    repository.release(ARTIFACT, hashes=["sha256"])
    assert main([*where, *what, "download"]) == 0
    assert target_path.read_bytes() == ARTIFACT
    assert (trusted_dir / "odd%2Frole%3F.json").exists()

    repository.release(b"new", hashes=["sha512"])
    (served,) = (path for path in (repository.targets_dir / "some").iterdir() if path.read_bytes() == b"new")
    served.write_bytes(b"bad")
    assert main([*where, *what, "download"]) == 1
    assert target_path.read_bytes() == ARTIFACT
    served.write_bytes(b"new")
    assert main([*where, *what, "download"]) == 0
    assert target_path.read_bytes() == b"new"
    served.unlink()
    assert main([*where, *what, "download"]) == 0  # it is not asked for again

    repository.release(b"newer", hashes=["sha256"], signed_by=CryptoSigner.generate_ed25519())
    assert main([*where, "refresh"]) == 1
    assert (read_version("timestamp"), read_version("snapshot")) == (2, 2)
    assert [path.name for path in target_dir.iterdir()] == ["some%2Ffile"]


def test_slow_drip_ends_at_the_one_deadline() -> None:
    class Dripping(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while not ended.wait(0.02):
                    self.wfile.write(b"x")
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    ended = threading.Event()
    fetcher = HttpFetcher(deadline_s=0.3)
    for url in serve(Dripping):
        with pytest.raises(DownloadError, match=r"not complete within 0\.3 s"):
            fetcher.download_bytes(url, 1 << 20)
        with pytest.raises(DownloadError, match=r"not complete within 0\.3 s"):
            fetcher.download_bytes(url, 1 << 20)  # the next file has no deadline of its own
        ended.set()
