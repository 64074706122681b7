"""The signed repository of a fleet."""

import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, Targets

from edge_agent.updates.fetcher import open_offer
from fl_server.directory import OFFLINE_KEYS, ONLINE_KEYS, Directory
from fl_server.errors import OfflineKeyError, UsageError
from fl_server.rollout.repository import ReleaseRepository
from models.contract.encoding import build_digest
from models.contract.errors import MalformedError
from models.contract.manifest import FileEntry
from models.contract.offer import COORDINATOR_KEY_TARGET, build_offer
from models.contract.terms import ProbationRules, ReleaseTerms, Role, Split
from models.contract.wave import Requirements, Wave
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.kill import run_and_kill
from tests.simulators.releases import ReleaseServer

NOW = datetime(2030, 1, 1, tzinfo=UTC)
GRAPH = FileEntry(digest=build_digest(b"graph"), size_bytes=5)


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "coordinator")


@pytest.fixture
def repository(directory: Directory) -> ReleaseRepository:
    return ReleaseRepository.create(directory, now=NOW)


def load_targets(repository: ReleaseRepository, role: str) -> Targets:
    name, data = next(item for item in repository.load_metadata().items() if item[0].endswith(f".{role}.json"))
    targets = Metadata[Targets].from_bytes(data).signed
    assert name == f"{targets.version}.{role}.json"
    return targets


def load_manifest(tmp_path: Path, number: int, model: str = "digits") -> bytes:
    server = ReleaseServer(tmp_path / f"{model}-{number}", MemoryBroker())
    return (server.write_version(number, b"inference %d" % number, model=model) / "manifest.json").read_bytes()


def test_new_repository_delegates_and_releases_only_the_coordinator_key(
    directory: Directory, repository: ReleaseRepository
) -> None:
    assert set(repository.load_metadata()) == {
        "1.root.json",
        "1.targets.json",
        "1.releases.json",
        "1.graphs.json",
        "1.snapshot.json",
        "timestamp.json",
    }
    root = Metadata[Root].from_bytes(repository.load_root()).signed
    assert (root.roles["root"].threshold, len(root.roles["root"].keyids)) == (2, 3)
    top = load_targets(repository, "targets")
    assert top.targets == {}
    assert top.delegations is not None
    assert top.delegations.roles is not None
    assert all(role.terminating for role in top.delegations.roles.values())
    pem = repository.build_coordinator_pem()
    assert load_targets(repository, "releases").targets[COORDINATOR_KEY_TARGET].hashes == {"sha256": build_digest(pem)}
    assert b"PUBLIC KEY" in pem


def test_keys_are_read_by_their_owner_only(directory: Directory, repository: ReleaseRepository) -> None:
    paths = [directory.online_keys_dir / f"{name}.pem" for name in ONLINE_KEYS]
    paths += [directory.offline_keys_dir / f"{name}.pem" for name in OFFLINE_KEYS]
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")


def test_repository_is_not_created_over_another(directory: Directory, repository: ReleaseRepository) -> None:
    with pytest.raises(UsageError, match="holds a repository already"):
        ReleaseRepository.create(directory, now=NOW)


def test_directory_without_a_repository_is_said_so(directory: Directory) -> None:
    with pytest.raises(UsageError, match="fl-server init"):
        ReleaseRepository(directory).load_metadata()


def test_graphs_are_signed_once_and_need_no_key_again(directory: Directory, repository: ReleaseRepository) -> None:
    repository.sign_graphs({"train_step.onnx": GRAPH}, now=NOW)
    assert list(load_targets(repository, "graphs").targets) == [f"graphs/{GRAPH.digest}/train_step.onnx"]
    (directory.offline_keys_dir / "graphs.pem").unlink()
    repository.sign_graphs({"train_step.onnx": GRAPH}, now=NOW)
    before = repository.load_metadata()
    with pytest.raises(OfflineKeyError, match="graphs was signed by 0/1 keys"):
        repository.sign_graphs({"evaluate.onnx": GRAPH}, now=NOW)
    assert repository.load_metadata() == before


def test_release_replaces_what_the_aliases_of_its_model_stood_for(
    tmp_path: Path, repository: ReleaseRepository
) -> None:
    first, second, other = load_manifest(tmp_path, 1), load_manifest(tmp_path, 2), load_manifest(tmp_path, 1, "text")
    repository.set_release("text", {"champion": other}, now=NOW)
    repository.set_release("digits", {"champion": first, "challenger": second}, now=NOW)
    repository.set_release("digits", {"champion": second, "previous": first}, now=NOW)
    targets = load_targets(repository, "releases").targets
    found = {path: target.hashes["sha256"] for path, target in targets.items() if path != COORDINATOR_KEY_TARGET}
    assert found == {
        "releases/digits/champion/manifest.json": build_digest(second),
        "releases/digits/previous/manifest.json": build_digest(first),
        "releases/text/champion/manifest.json": build_digest(other),
    }
    assert targets["releases/digits/champion/manifest.json"].custom == {
        "schema_version": 1,
        "role": "champion",
        "version": 2,
    }


def build_challenge(split: Split) -> dict[Role, ReleaseTerms]:
    return {"challenger": ReleaseTerms(role="challenger", version=2, split=split)}


def test_challenger_is_signed_with_its_split_and_another_split_is_another_release(
    tmp_path: Path, repository: ReleaseRepository
) -> None:
    manifests = {"champion": load_manifest(tmp_path, 1), "challenger": load_manifest(tmp_path, 2)}
    repository.set_release("digits", manifests, terms=build_challenge(Split(weight=Decimal("0.1"))), now=NOW)
    custom = load_targets(repository, "releases").targets["releases/digits/challenger/manifest.json"].custom
    assert custom == {
        "schema_version": 1,
        "role": "challenger",
        "version": 2,
        "split": {"weight": "0.1", "shadow": False},
    }
    before = repository.load_metadata()
    repository.set_release("digits", manifests, terms=build_challenge(Split(weight=Decimal("0.1"))), now=NOW)
    assert repository.load_metadata() == before
    repository.set_release("digits", manifests, terms=build_challenge(Split(shadow=True)), now=NOW)
    assert repository.load_metadata() != before


def test_champion_is_signed_with_its_wave_and_what_it_asks_for_and_a_grown_wave_is_another_release(
    tmp_path: Path, repository: ReleaseRepository
) -> None:
    manifests: dict[Role, bytes] = {"champion": load_manifest(tmp_path, 2), "previous": load_manifest(tmp_path, 1)}

    def release(percentage: str) -> None:
        wave = Wave(key="ab12", percentage=Decimal(percentage), devices=("kitchen",))
        champion = ReleaseTerms(
            role="champion",
            version=2,
            requirements=Requirements(hardware=("aarch64",)),
            wave=wave,
            probation=ProbationRules(seconds=60, max_latency_ratio=Decimal(2)),
        )
        repository.set_release("digits", manifests, terms={"champion": champion}, now=NOW)

    release("12.5")
    targets = load_targets(repository, "releases").targets
    assert targets["releases/digits/champion/manifest.json"].custom == {
        "schema_version": 1,
        "role": "champion",
        "version": 2,
        "requirements": {"hardware": ["aarch64"], "agent": "", "regions": []},
        "wave": {"key": "ab12", "percentage": "12.5", "devices": ["kitchen"]},
        "probation": {"seconds": 60, "min_agreement": "0", "max_latency_ratio": "2"},
    }
    assert "wave" not in targets["releases/digits/previous/manifest.json"].custom
    before = repository.load_metadata()
    release("12.5")
    assert repository.load_metadata() == before
    release("50")
    assert repository.load_metadata() != before


def test_same_release_again_signs_nothing(tmp_path: Path, repository: ReleaseRepository) -> None:
    manifest = load_manifest(tmp_path, 1)
    repository.set_release("digits", {"champion": manifest}, now=NOW)
    before = repository.load_metadata()
    repository.set_release("digits", {"champion": manifest}, now=NOW + timedelta(hours=1))
    assert repository.load_metadata() == before


def test_what_is_no_manifest_of_the_model_is_not_released(tmp_path: Path, repository: ReleaseRepository) -> None:
    manifest = load_manifest(tmp_path, 1)
    with pytest.raises(UsageError, match="'digits', not of 'text'"):
        repository.set_release("text", {"champion": manifest}, now=NOW)
    with pytest.raises(UsageError, match="alias 'latest'"):
        repository.set_release("digits", {"latest": manifest}, now=NOW)
    with pytest.raises(MalformedError):
        repository.set_release("digits", {"champion": b"{}"}, now=NOW)
    others: dict[Role, ReleaseTerms] = {"champion": ReleaseTerms(role="champion", version=2)}
    with pytest.raises(UsageError, match="the champion is version 1, its terms are of the champion, version 2"):
        repository.set_release("digits", {"champion": manifest}, terms=others, now=NOW)


def test_metadata_is_signed_again_when_a_quarter_of_its_lifetime_is_left(repository: ReleaseRepository) -> None:
    def versions() -> list[str]:
        return sorted(repository.load_metadata())

    first = versions()
    before = repository.load_metadata()
    assert repository.refresh_expiring(NOW + timedelta(hours=17)) == ()
    assert repository.load_metadata() == before
    repository.refresh_expiring(NOW + timedelta(hours=18))
    assert versions() == sorted(name.replace("1.snapshot", "2.snapshot") for name in first)
    repository.refresh_expiring(NOW + timedelta(days=6))
    assert {"2.releases.json", "1.graphs.json", "1.targets.json"} <= set(versions())
    repository.refresh_expiring(NOW + timedelta(days=300))
    assert {"1.root.json", "2.root.json", "2.graphs.json", "2.targets.json"} <= set(versions())


def test_roles_that_are_due_but_whose_keys_are_elsewhere_are_named(
    directory: Directory, repository: ReleaseRepository
) -> None:
    for name in OFFLINE_KEYS:
        (directory.offline_keys_dir / f"{name}.pem").unlink()
    assert repository.refresh_expiring(NOW + timedelta(days=300)) == ("root", "targets", "graphs")
    assert set(repository.load_metadata()) >= {"1.root.json", "1.graphs.json", "2.releases.json"}


def test_two_of_three_root_keys_renew_the_root(directory: Directory, repository: ReleaseRepository) -> None:
    (directory.offline_keys_dir / "root-2.pem").unlink()
    repository.refresh_expiring(NOW + timedelta(days=300))
    first, second = (
        Metadata[Root].from_bytes(repository.load_metadata()[f"{version}.root.json"]) for version in (1, 2)
    )
    first.signed.verify_delegate("root", second.signed_bytes, second.signatures)
    assert repository.load_root() == repository.load_metadata()["2.root.json"]


def test_files_of_a_change_that_was_cut_short_are_ignored_and_replaced(
    directory: Directory, repository: ReleaseRepository
) -> None:
    before = repository.load_metadata()
    for name in ("2.releases.json", "2.snapshot.json", "7.graphs.json"):
        (directory.tuf_dir / name).write_bytes(b"half")
    assert repository.load_metadata() == before
    repository.sign_graphs({"train_step.onnx": GRAPH}, now=NOW)
    assert sorted(path.name for path in directory.tuf_dir.glob("*.json")) == sorted(repository.load_metadata())
    assert load_targets(repository, "graphs").version == 2


def test_kill_at_any_change_of_the_disk_leaves_the_old_or_the_new_repository(
    tmp_path: Path, directory: Directory
) -> None:
    ReleaseRepository.create(directory, now=datetime.now(UTC))
    manifest = load_manifest(tmp_path, 1)
    target = "releases/digits/champion/manifest.json"
    at, lived, seen = 0, False, set[bool]()
    while not lived:
        at += 1
        copy = Directory(tmp_path / f"copy-{at}")
        shutil.copytree(directory.path, copy.path)
        repository = ReleaseRepository(copy)
        lived = run_and_kill(
            lambda: repository.set_release("digits", {"champion": manifest}, now=datetime.now(UTC)),  # noqa: B023
            at=at,
        )
        (trust_dir := copy.path / "trust").mkdir()
        offer = build_offer(repository.load_metadata())
        seen.add(open_offer(offer, root=repository.load_root(), trust_dir=trust_dir).find_target(target) is not None)
        repository.set_release("digits", {"champion": manifest}, now=datetime.now(UTC))
        offer = build_offer(repository.load_metadata())
        assert open_offer(offer, root=repository.load_root(), trust_dir=trust_dir).find_target(target) is not None
    assert seen == {False, True}


def test_reader_never_sees_half_of_what_another_process_changes(
    directory: Directory, repository: ReleaseRepository
) -> None:
    def renew() -> None:
        for _ in range(30):
            ReleaseRepository(directory).renew(("timestamp",), now=NOW)

    with ThreadPoolExecutor() as pool:
        changes = pool.submit(renew)
        while not changes.done():
            assert len(repository.load_metadata()) == 6
    changes.result()


def test_offer_of_ten_live_targets_is_small(tmp_path: Path, repository: ReleaseRepository) -> None:
    for number in range(1, 5):
        name = f"model-{number}"
        manifests = [load_manifest(tmp_path, version, name) for version in (1, 2)]
        repository.set_release(name, {"previous": manifests[0], "champion": manifests[1]}, now=NOW)
    assert len(build_offer(repository.load_metadata())) < 6500
