"""What a fleet trusts: the signed TUF repository of its releases, on disk.

    root (2 of 3, offline) -> targets (offline) -+-> releases (online): champions, coordinator key
                           -> snapshot (online)  `-> graphs (offline): the graphs that hold the clipping
                           -> timestamp (online)

The top-level targets only delegate, so that a stolen online key cannot claim the graphs for itself.
Every change writes its versioned files first and `timestamp.json` last: what `timestamp.json` leads to is
the repository, and a kill between two files leaves nothing but files that nobody refers to.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from fl_server.directory import OFFLINE_KEYS, ONLINE_KEYS, Directory
from fl_server.errors import OfflineKeyError, UsageError
from fl_server.rollout.keys import build_public_pem, create_key, load_key
from models.contract.encoding import build_digest
from models.contract.files import save_atomically
from models.contract.manifest import FileEntry, parse_manifest
from models.contract.offer import (
    COORDINATOR_KEY_TARGET,
    ROLE_GRAPHS,
    ROLE_RELEASES,
    build_graph_target,
    build_release_target,
)
from models.contract.terms import ReleaseTerms, Role, Split, build_terms

ALIASES = frozenset(get_args(Role))
ROOT_THRESHOLD = 2
ROOT_KEYS = ("root-1", "root-2", "root-3")
LIFETIMES = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    ROLE_GRAPHS: timedelta(days=365),
    ROLE_RELEASES: timedelta(days=7),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(hours=24),
}
_TARGETS_ROLES = ("targets", ROLE_RELEASES, ROLE_GRAPHS)
_DELEGATED_PATHS = {ROLE_RELEASES: ["releases/*/*/*", "keys/*"], ROLE_GRAPHS: ["graphs/*/*"]}


@dataclass(frozen=True, slots=True)
class _State:
    """The current repository; what hangs on it is changed in place before it is issued."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: dict[str, Targets]  # by role: "targets" and the two it delegates to


class ReleaseRepository:
    """The repository in a coordinator's directory; one process changes it at a time."""

    def __init__(self, directory: Directory) -> None:
        self._dir = directory.tuf_dir
        self._online_dir, self._offline_dir = directory.online_keys_dir, directory.offline_keys_dir

    @classmethod
    def create(cls, directory: Directory, *, now: datetime) -> Self:
        """Create all keys and a repository without releases; `now` is aware, in UTC.

        Raises:
            UsageError: There is one already.
        """
        repository = cls(directory)
        if (repository._dir / "timestamp.json").exists():
            raise UsageError(f"{repository._dir} holds a repository already")
        repository._dir.mkdir(parents=True, exist_ok=True)
        for folder, names in ((repository._online_dir, ONLINE_KEYS), (repository._offline_dir, OFFLINE_KEYS)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in names:
                create_key(folder / f"{name}.pem")
        with repository._locked():
            state = repository._build_first_state()
            signed = {role: repository._sign(state, role, now) for role in ("root", *_TARGETS_ROLES, "snapshot")}
            repository._save(signed | {"timestamp": repository._sign(state, "timestamp", now)}, state)
        return repository

    def sign_graphs(self, graphs: Mapping[str, FileEntry], *, now: datetime) -> None:
        """Sign graphs, by file name, as ones that devices may train with; signed ones need no key again.

        Raises:
            OfflineKeyError: The graphs key is not on this machine.
        """
        with self._locked():
            state = self._load()
            signed = state.targets[ROLE_GRAPHS].targets
            new = [_build_target(build_graph_target(entry.digest, name), entry) for name, entry in graphs.items()]
            added = {target.path: target for target in new if target.path not in signed}
            if added:
                signed.update(added)
                self._issue(state, {ROLE_GRAPHS}, now)

    def set_release(
        self, model: str, manifests: Mapping[Role, bytes], *, now: datetime, split: Split | None = None
    ) -> None:
        """Let each alias of `model` stand for a manifest; aliases not named stand for nothing from now on.

        Args:
            model: All manifests must be its.
            manifests: Manifest bytes by alias.
            now: Aware, in UTC.
            split: What the challenger is for; None without one.

        Raises:
            MalformedError: Bytes that are no manifest.
            UsageError: An unknown alias, or a manifest of another model.
        """
        released = {target.path: target for target in _build_releases(model, manifests, split)}
        with self._locked():
            state = self._load()
            releases = state.targets[ROLE_RELEASES]
            mine = {build_release_target(model, alias) for alias in ALIASES}
            changed = {path: target for path, target in releases.targets.items() if path not in mine} | released
            if changed != releases.targets:
                releases.targets = changed
                self._issue(state, {ROLE_RELEASES}, now)

    def refresh_expiring(self, now: datetime) -> tuple[str, ...]:
        """Sign again what has a quarter of its lifetime left or less.

        Returns:
            Roles that are due but whose keys are kept on another machine; a person must act.
        """
        with self._locked():
            state = self._load()
            due = [role for role in ("root", *_TARGETS_ROLES) if _is_due(role, _get(state, role), now)]
            possible = {role for role in due if self._has_keys(role)}
            stale = _is_due("snapshot", state.snapshot, now) or _is_due("timestamp", state.timestamp, now)
            if "root" in possible:
                state.root.version += 1
                self._save({"root": self._sign(state, "root", now)}, state)
            if stale or possible - {"root"}:
                self._issue(state, possible - {"root"}, now)
            return tuple(role for role in due if role not in possible)

    def load_metadata(self) -> dict[str, bytes]:
        """Return every file a client may need, by name: the contents of an offer."""
        state = self._load()
        chain = [f"{version}.root.json" for version in range(1, state.root.version + 1)]
        roles = [
            ("snapshot", state.snapshot.version),
            *((role, state.targets[role].version) for role in _TARGETS_ROLES),
        ]
        names = [*chain, "timestamp.json", *(f"{version}.{role}.json" for role, version in roles)]
        return {name: (self._dir / name).read_bytes() for name in names}

    def load_root(self) -> bytes:
        """Return the newest root: what a device is given at enrolment."""
        return (self._dir / f"{self._find_root_version()}.root.json").read_bytes()

    def build_coordinator_pem(self) -> bytes:
        """Return the public key that devices check orders with: the bytes of its target."""
        return build_public_pem(load_key(self._online_dir / "orders.pem").public_key())

    def _build_first_state(self) -> _State:
        signers = {name: _signer(load_key(self._get_key_path(name))) for name in (*ONLINE_KEYS, *OFFLINE_KEYS)}
        root = Root(version=1, consistent_snapshot=True)
        for name in ROOT_KEYS:
            root.add_key(signers[name].public_key, "root")
        root.roles["root"].threshold = ROOT_THRESHOLD
        for role in ("targets", "snapshot", "timestamp"):
            root.add_key(signers[role].public_key, role)
        keys = {role: signers[role].public_key for role in _DELEGATED_PATHS}
        delegated = {
            role: DelegatedRole(role, [keys[role].keyid], threshold=1, terminating=True, paths=paths)
            for role, paths in _DELEGATED_PATHS.items()
        }
        pem = self.build_coordinator_pem()
        key_entry = FileEntry(digest=build_digest(pem), size_bytes=len(pem))
        targets = {
            "targets": Targets(
                version=1, delegations=Delegations({key.keyid: key for key in keys.values()}, delegated)
            ),
            ROLE_RELEASES: Targets(
                version=1, targets={COORDINATOR_KEY_TARGET: _build_target(COORDINATOR_KEY_TARGET, key_entry)}
            ),
            ROLE_GRAPHS: Targets(version=1),
        }
        snapshot = Snapshot(version=1, meta={f"{role}.json": MetaFile(1) for role in _TARGETS_ROLES})
        return _State(root, Timestamp(version=1, snapshot_meta=MetaFile(1)), snapshot, targets)

    def _issue(self, state: _State, roles: set[str], now: datetime) -> None:
        """Publish new versions of the targets `roles`, of the snapshot and of the timestamp."""
        for role in roles:
            state.targets[role].version += 1
            state.snapshot.meta[f"{role}.json"] = MetaFile(state.targets[role].version)
        state.snapshot.version += 1
        state.timestamp.version += 1
        state.timestamp.snapshot_meta = MetaFile(state.snapshot.version)
        self._save({role: self._sign(state, role, now) for role in (*sorted(roles), "snapshot", "timestamp")}, state)

    def _sign(self, state: _State, role: str, now: datetime) -> bytes:
        signed = _get(state, role)
        signed.expires = (now + LIFETIMES[role]).replace(microsecond=0)
        metadata = Metadata[Any](signed)
        for path in self._get_key_paths(role):
            metadata.sign(_signer(load_key(path)), append=True)
        delegator = state.targets["targets"] if role in _DELEGATED_PATHS else state.root
        # A key file that was swapped is found here, not by a fleet that refuses the offer.
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        return metadata.to_bytes(JSONSerializer(compact=True))

    def _save(self, signed: Mapping[str, bytes], state: _State) -> None:
        """Write in the order given, which ends with the timestamp, and drop what nobody refers to any more."""
        for role, data in signed.items():
            name = "timestamp.json" if role == "timestamp" else f"{_get(state, role).version}.{role}.json"
            save_atomically(self._dir / name, data)
        current = {f"{_get(state, role).version}.{role}.json" for role in (*_TARGETS_ROLES, "snapshot")}
        for path in self._dir.glob("*.json"):
            if path.name not in current and path.name != "timestamp.json" and not path.name.endswith(".root.json"):
                path.unlink()

    def _load(self) -> _State:
        if not (self._dir / "timestamp.json").exists():
            raise UsageError(f"{self._dir} holds no repository; create one with fl-server init")
        timestamp = Metadata[Timestamp].from_file(str(self._dir / "timestamp.json")).signed
        snapshot_name = f"{timestamp.snapshot_meta.version}.snapshot.json"
        snapshot = Metadata[Snapshot].from_file(str(self._dir / snapshot_name)).signed
        targets = {
            role: Metadata[Targets]
            .from_file(str(self._dir / f"{snapshot.meta[f'{role}.json'].version}.{role}.json"))
            .signed
            for role in _TARGETS_ROLES
        }
        root = Metadata[Root].from_file(str(self._dir / f"{self._find_root_version()}.root.json")).signed
        return _State(root, timestamp, snapshot, targets)

    def _find_root_version(self) -> int:
        versions = [int(path.name.split(".")[0]) for path in self._dir.glob("[0-9]*.root.json")]
        if not versions:
            raise UsageError(f"{self._dir} holds no repository; create one with fl-server init")
        return max(versions)

    def _get_key_path(self, name: str) -> Path:
        return (self._online_dir if name in ONLINE_KEYS else self._offline_dir) / f"{name}.pem"

    def _get_key_paths(self, role: str) -> list[Path]:
        """Return whose signatures make `role` valid; of the root keys those that are here, at least the threshold."""
        if role != "root":
            return [self._get_key_path(role)]
        present = [path for name in ROOT_KEYS if (path := self._get_key_path(name)).exists()]
        if len(present) < ROOT_THRESHOLD:
            raise OfflineKeyError(
                f"{len(present)} root keys are in {self._offline_dir}, {ROOT_THRESHOLD} must sign: run this where they are"
            )
        return present

    def _has_keys(self, role: str) -> bool:
        try:
            return all(path.exists() for path in self._get_key_paths(role))
        except OfflineKeyError:
            return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep another process (an operator's command) from changing the repository meanwhile."""
        descriptor = os.open(self._dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _get(state: _State, role: str) -> Signed:
    top: dict[str, Signed] = {"root": state.root, "timestamp": state.timestamp, "snapshot": state.snapshot}
    return top[role] if role in top else state.targets[role]


def _is_due(role: str, signed: Signed, now: datetime) -> bool:
    return signed.expires - now <= LIFETIMES[role] / 4


def _signer(key: Ed25519PrivateKey) -> CryptoSigner:
    return CryptoSigner(key)


def _build_target(path: str, entry: FileEntry, custom: dict[str, object] | None = None) -> TargetFile:
    fields = {} if custom is None else {"custom": custom}
    return TargetFile(entry.size_bytes, {"sha256": entry.digest}, path, unrecognized_fields=fields)


def _build_releases(model: str, manifests: Mapping[Role, bytes], split: Split | None) -> Iterator[TargetFile]:
    for alias, data in manifests.items():
        manifest = parse_manifest(data)
        if alias not in ALIASES:
            raise UsageError(f"alias {alias!r} is none of {', '.join(sorted(ALIASES))}")
        if manifest.model != model:
            raise UsageError(f"the {alias} is a manifest of {manifest.model!r}, not of {model!r}")
        entry = FileEntry(digest=build_digest(data), size_bytes=len(data))
        terms = ReleaseTerms(
            role=alias, version=manifest.version, split=split or Split() if alias == "challenger" else None
        )
        yield _build_target(build_release_target(model, alias), entry, build_terms(terms))
