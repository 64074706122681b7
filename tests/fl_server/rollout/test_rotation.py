"""Keys are replaced, and the devices of the fleet follow."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signature, Signer
from tuf.api.metadata import Metadata, Root

from edge_agent.errors import StalledError
from edge_agent.updates.fetcher import open_offer
from edge_agent.updates.targets import SignedTargets
from fl_server.__main__ import main
from fl_server.directory import Directory
from fl_server.errors import OfflineKeyError, ServerError, UsageError
from fl_server.initialise import initialise
from fl_server.rollout.keys import build_public_pem, create_key, load_key
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rollout.trust import ROLES, Rotation
from models.contract.encoding import build_digest
from models.contract.manifest import FileEntry
from models.contract.offer import COORDINATOR_KEY_TARGET, build_graph_target, build_offer
from tests.simulators.kill import run_and_kill

NOW = datetime.now(UTC)
GRAPH = FileEntry(digest=build_digest(b"graph"), size_bytes=5)


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "coordinator")


@pytest.fixture
def repository(directory: Directory) -> ReleaseRepository:
    return ReleaseRepository.create(directory, now=NOW)


@pytest.fixture
def root(repository: ReleaseRepository) -> bytes:
    return repository.load_root()


def open_on_device(repository: ReleaseRepository, root: bytes, trust_dir: Path) -> SignedTargets:
    return open_offer(build_offer(repository.load_metadata()), root=root, trust_dir=trust_dir)


def list_keyids(repository: ReleaseRepository) -> dict[str, set[str]]:
    return {status.role: {key.keyid for key in status.keys} for status in repository.describe()}


@pytest.mark.parametrize("role", ROLES)
def test_devices_follow_when_the_keys_of_any_role_are_replaced(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository, root: bytes, role: str
) -> None:
    open_on_device(repository, root, tmp_path / "trust")
    stolen = Directory(tmp_path / "stolen")
    shutil.copytree(directory.path, stolen.path)
    before = list_keyids(repository)
    created = repository.rotate(Rotation(roles=(role,)), now=NOW)
    after = list_keyids(repository)
    assert not before[role] & after[role]
    assert {name: keyids for name, keyids in before.items() if name != role}.items() <= after.items()
    assert len(created) == len(after[role]) == len(before[role])
    repository.sign_graphs({"train_step.onnx": GRAPH}, now=NOW)
    signed = open_on_device(repository, root, tmp_path / "trust").signed
    assert set(signed) == {COORDINATOR_KEY_TARGET, build_graph_target(GRAPH.digest, "train_step.onnx")}

    thief = ReleaseRepository(stolen)
    for _ in range(3):  # newer than everything genuine
        thief.renew((role,), now=NOW + timedelta(hours=1))
    open_on_device(thief, root, tmp_path / "unaware")
    with pytest.raises(StalledError, match=r"offer refused: .*(was signed by|version)"):
        open_on_device(thief, root, tmp_path / "trust")


def test_keys_of_several_roles_are_replaced_in_one_root(repository: ReleaseRepository) -> None:
    repository.rotate(Rotation(roles=("timestamp", "snapshot", "releases")), now=NOW)
    assert {status.role: status.version for status in repository.describe()} == {
        "root": 2,
        "targets": 2,
        "graphs": 1,
        "releases": 2,
        "snapshot": 2,
        "timestamp": 2,
    }


def test_replaced_online_keys_are_gone_and_offline_keys_are_left_to_their_owner(
    directory: Directory, repository: ReleaseRepository
) -> None:
    repository.rotate(Rotation(roles=("timestamp", "targets")), now=NOW)
    online, offline = (
        {path.name for path in folder.iterdir()} for folder in (directory.online_keys_dir, directory.offline_keys_dir)
    )
    assert "timestamp.pem" not in online
    assert {"targets.pem", "root-1.pem"} < offline


def test_lost_root_key_is_replaced_by_the_other_two(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository, root: bytes
) -> None:
    keys = {key.place: key.keyid for key in repository.describe()[0].keys}
    lost = keys.pop(str(directory.offline_keys_dir / "root-2.pem"))
    (directory.offline_keys_dir / "root-2.pem").unlink()
    repository.rotate(Rotation(roles=("root",), keyid=lost[:12]), now=NOW)
    after = list_keyids(repository)["root"]
    assert lost not in after
    assert len(after) == 3
    assert set(keys.values()) < after
    open_on_device(repository, root, tmp_path / "trust")


def test_one_root_key_of_three_changes_nothing(directory: Directory, repository: ReleaseRepository) -> None:
    for name in ("root-1", "root-3"):
        (directory.offline_keys_dir / f"{name}.pem").unlink()
    before = repository.load_metadata()
    files = sorted(directory.path.rglob("*"))
    with pytest.raises(OfflineKeyError, match="root was signed by 1/2 keys"):
        repository.rotate(Rotation(roles=("timestamp", "releases")), now=NOW)
    with pytest.raises(OfflineKeyError, match="root was signed by 1/2 keys"):
        repository.rotate(Rotation(roles=("root",)), now=NOW)  # the new keys alone are not enough
    assert repository.load_metadata() == before
    assert sorted(directory.path.rglob("*")) == files


def test_offline_keys_may_be_on_two_sticks(tmp_path: Path, directory: Directory, repository: ReleaseRepository) -> None:
    sticks = [tmp_path / "stick-1", tmp_path / "stick-2"]
    directory.offline_keys_dir.rename(sticks[0])
    sticks[1].mkdir()
    for name in ("root-1.pem", "root-2.pem"):
        (sticks[0] / name).rename(sticks[1] / name)
    with pytest.raises(OfflineKeyError):
        ReleaseRepository(directory, sticks[:1]).rotate(Rotation(roles=("timestamp",)), now=NOW)
    (created,) = ReleaseRepository(directory, sticks).rotate(Rotation(roles=("graphs",)), now=NOW)
    assert created.parent == sticks[0]
    assert not directory.offline_keys_dir.exists()


def test_external_signer_takes_over_a_root_key(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository, root: bytes
) -> None:
    key = create_key(tmp_path / "token.pem")
    (tmp_path / "token.pub").write_bytes(build_public_pem(key.public_key()))
    first = repository.describe()[0].keys[0].keyid
    signer = (f"file2:{tmp_path / 'token.pem'}", tmp_path / "token.pub")
    with pytest.raises(UsageError, match="3 keys of root"):
        repository.rotate(Rotation(roles=("root",), signer=signer), now=NOW)
    repository.rotate(Rotation(roles=("root",), keyid=first, signer=signer), now=NOW)
    places = [key.place for key in repository.describe()[0].keys]
    assert signer[0] in places
    for place in places:
        if place != signer[0] and place != str(directory.offline_keys_dir / "root-2.pem"):
            Path(place or "").unlink()
    repository.renew(("root",), now=NOW)  # one file and the signer make two
    open_on_device(repository, root, tmp_path / "trust")


class KeyService(Signer):
    """Signs with a key file; that it is away shows no sooner than that."""

    def __init__(self, path: Path, key: Key) -> None:
        self._path, self._key = path, key

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, *_: object) -> "KeyService":
        return cls(Path(priv_key_uri.partition(":")[2]), public_key)

    @property
    def public_key(self) -> Key:
        return self._key

    def sign(self, payload: bytes) -> Signature:
        return CryptoSigner(load_key(self._path)).sign(payload)


def create_token(tmp_path: Path, scheme: str) -> tuple[str, Path]:
    """Return the URI of a signer that works while `token.pem` is there, and the file of its public key."""
    (tmp_path / "token.pub").write_bytes(build_public_pem(create_key(tmp_path / "token.pem").public_key()))
    return f"{scheme}:{tmp_path / 'token.pem'}", tmp_path / "token.pub"


@pytest.mark.parametrize("scheme", ["file2", "service"])
def test_signer_that_is_away_keeps_its_own_role_from_being_signed_and_no_other(
    tmp_path: Path, repository: ReleaseRepository, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "service", KeyService)
    repository.rotate(Rotation(roles=("graphs",), signer=create_token(tmp_path, scheme)), now=NOW)
    (tmp_path / "token.pem").unlink()
    later = NOW + timedelta(days=300)
    assert repository.refresh_expiring(later) == ("graphs",)
    assert all(status.expires > later for status in repository.describe() if status.role != "timestamp")
    with pytest.raises(ServerError, match=r"token\.pem"):
        repository.renew(("graphs",), now=later)
    with pytest.raises(ServerError, match=r"token\.pem"):
        repository.rotate(
            Rotation(roles=("targets",), signer=(f"{scheme}:{tmp_path / 'token.pem'}", tmp_path / "token.pub")), now=NOW
        )


@pytest.mark.parametrize("scheme", ["file2", "service"])
def test_root_is_signed_by_two_keys_though_the_third_is_away(
    tmp_path: Path, repository: ReleaseRepository, root: bytes, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "service", KeyService)
    first = repository.describe()[0].keys[0].keyid
    token = create_token(tmp_path, scheme)
    repository.rotate(Rotation(roles=("root",), keyid=first, signer=token), now=NOW)
    (tmp_path / "token.pem").unlink()
    later = NOW + timedelta(days=300)
    assert repository.refresh_expiring(later) == ()
    assert repository.describe()[0].expires > later + timedelta(days=300)
    away = next(key.keyid for key in repository.describe()[0].keys if key.place == token[0])
    repository.rotate(Rotation(roles=("root",), keyid=away), now=later)
    assert open_on_device(repository, root, tmp_path / "trust")


def test_damaged_metadata_is_named(directory: Directory, repository: ReleaseRepository) -> None:
    for data in (b"", b"{}", b"not json"):
        (directory.tuf_dir / "1.snapshot.json").write_bytes(data)
        with pytest.raises(ServerError, match=r"1\.snapshot\.json"):
            repository.refresh_expiring(NOW)


def test_same_signer_a_second_time_is_refused_and_still_signs(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository
) -> None:
    rotation = Rotation(roles=("timestamp",), signer=create_token(tmp_path, "file2"))
    repository.rotate(rotation, now=NOW)
    with pytest.raises(UsageError, match="signs timestamp already"):
        repository.rotate(rotation, now=NOW)
    repository.renew(("timestamp",), now=NOW)


def test_change_of_keys_that_fails_leaves_the_files_that_were_there(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository
) -> None:
    signer = create_token(tmp_path, "file2")
    repository.rotate(Rotation(roles=("graphs",), signer=signer), now=NOW)
    repository.rotate(Rotation(roles=("graphs",)), now=NOW)
    (directory.offline_keys_dir / "targets.pem").unlink()
    before = sorted(directory.path.rglob("*"))
    with pytest.raises(OfflineKeyError):
        repository.rotate(Rotation(roles=("graphs",), signer=signer), now=NOW)  # back to the token
    assert sorted(directory.path.rglob("*")) == before


def test_signer_that_has_another_key_is_refused(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository
) -> None:
    create_key(tmp_path / "token.pem")
    foreign = build_public_pem(create_key(tmp_path / "foreign.pem").public_key())
    (tmp_path / "token.pub").write_bytes(foreign)
    for uri in (f"file2:{tmp_path / 'token.pem'}", f"file2:{tmp_path / 'none.pem'}", "nothing:x"):
        with pytest.raises(ServerError, match=uri.partition(":")[0]):
            repository.rotate(Rotation(roles=("graphs",), signer=(uri, tmp_path / "token.pub")), now=NOW)
    assert not list(directory.path.rglob("*.signer"))


def test_root_is_renewed_with_the_keys_of_a_stick(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository
) -> None:
    stick = tmp_path / "stick"
    directory.offline_keys_dir.rename(stick)
    later = NOW + timedelta(days=300)
    assert repository.refresh_expiring(later) == ("root", "targets", "graphs")
    assert ReleaseRepository(directory, [stick]).refresh_expiring(later) == ()
    first, second = (Metadata[Root].from_bytes(repository.load_metadata()[f"{number}.root.json"]) for number in (1, 2))
    first.signed.verify_delegate("root", second.signed_bytes, second.signatures)
    assert repository.refresh_expiring(later) == ()


def test_change_of_keys_that_was_cut_short_is_made_good_by_the_next_refresh(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository, root: bytes
) -> None:
    at, lived, versions = 0, False, set[int]()
    while not lived:
        at += 2
        copy = Directory(tmp_path / f"copy-{at}")
        shutil.copytree(directory.path, copy.path)
        cut = ReleaseRepository(copy)
        lived = run_and_kill(
            lambda: cut.rotate(Rotation(roles=("timestamp", "releases")), now=NOW),  # noqa: B023
            at=at,
        )
        versions.add(cut.describe()[0].version)
        assert cut.refresh_expiring(NOW) == ()
        open_on_device(cut, root, tmp_path / f"trust-{at}")
        shutil.rmtree(copy.path)
    assert versions == {1, 2}


def test_order_key_that_was_replaced_reaches_devices(
    tmp_path: Path, directory: Directory, repository: ReleaseRepository, root: bytes
) -> None:
    before = repository.build_coordinator_pem()
    repository.rotate_order_key(now=NOW)
    pem = repository.build_coordinator_pem()
    assert pem != before
    signed = open_on_device(repository, root, tmp_path / "trust")
    assert signed.find_target(COORDINATOR_KEY_TARGET) == FileEntry(digest=build_digest(pem), size_bytes=len(pem))
    create_key(directory.order_key_path)  # as a kill leaves it
    repository.refresh_expiring(NOW)
    found = open_on_device(repository, root, tmp_path / "trust").find_target(COORDINATOR_KEY_TARGET)
    assert found is not None
    assert found.digest == build_digest(repository.build_coordinator_pem())


def test_commands_show_replace_and_renew(
    tmp_path: Path, directory: Directory, capsys: pytest.CaptureFixture[str]
) -> None:
    initialise(directory.path, fleet="home", host="127.0.0.1")
    config, stick = ("--config", str(directory.config_path)), tmp_path / "stick"
    directory.offline_keys_dir.rename(stick)
    assert main(["keys", *config]) == 0
    shown = capsys.readouterr().out
    assert "2 of 3" in shown
    assert "not here" in shown
    assert str(directory.online_keys_dir / "timestamp.pem") in shown
    assert main(["keys", "rotate", "timestamp", "orders", *config]) == 1
    assert "name their folder with --keys" in capsys.readouterr().err
    assert main(["keys", *config, "rotate", "--keys", str(stick), "timestamp", "orders"]) == 0
    said = capsys.readouterr().out
    assert "restart the coordinator" in said
    assert len([line for line in said.splitlines() if line.startswith("new: ")]) == 2
    assert main(["keys", "renew", "graphs", *config]) == 1
    assert main(["keys", "renew", "graphs", *config, "--keys", str(stick)]) == 0
    assert main(["keys", "renew", *config]) == 0
    assert main(["keys", "renew", "nobody", *config]) == 2
    assert main(["keys", "rotate", "root", "graphs", "--key", "00", *config]) == 2
    capsys.readouterr()
    assert main(["keys", *config, "--keys", str(stick)]) == 0
    assert "not here" not in capsys.readouterr().out
    load_pem_private_key(directory.order_key_path.read_bytes(), password=None)
