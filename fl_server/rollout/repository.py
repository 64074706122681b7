"""What a fleet trusts: the signed TUF repository of its releases.

Everything is signed before anything is saved. A new root counts as soon as it is saved; what a kill just then left
signed by the keys before it, `refresh_expiring` signs again.
"""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, get_args

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, TargetFile
from tuf.api.serialization.json import JSONSerializer

from fl_server.directory import OFFLINE_KEYS, ONLINE_KEYS, Directory
from fl_server.errors import OfflineKeyError, ServerError, UsageError
from fl_server.rollout.keys import (
    KEYID_SHOWN,
    KeyRing,
    build_public_pem,
    create_key,
    create_role_key,
    load_key,
    save_external,
)
from fl_server.rollout.store import Store
from fl_server.rollout.trust import (
    LIFETIMES,
    ONLINE_ROLES,
    ROLES,
    TARGETS_ROLES,
    RoleKey,
    RoleStatus,
    Rotation,
    State,
    build_first_state,
)
from models.contract.encoding import build_digest
from models.contract.floors import TOLD_ROLES, Floor, Floors, build_keys_digest
from models.contract.manifest import FileEntry, parse_manifest
from models.contract.offer import (
    COORDINATOR_KEY_TARGET,
    ROLE_GRAPHS,
    ROLE_RELEASES,
    SIGNED_AT_FIELD,
    build_graph_target,
    build_release_target,
    build_signed_at,
    parse_signed_at,
)
from models.contract.terms import ReleaseTerms, Role, Split, build_terms

logger = logging.getLogger(__name__)

ALIASES = frozenset(get_args(Role))


class ReleaseRepository:
    """The repository in a coordinator's directory; one process changes it at a time."""

    def __init__(self, directory: Directory, keys: Sequence[Path] = ()) -> None:
        """Open it; `keys` are folders outside of it that hold further keys, new offline ones go to the first."""
        self._dir, self._order_key_path = directory.tuf_dir, directory.order_key_path
        self._store = Store(directory.tuf_dir)
        self._online_dir, self._offline_dir = directory.online_keys_dir, directory.offline_keys_dir
        self._new_offline_dir = keys[0] if keys else directory.offline_keys_dir
        self._ring = KeyRing(self._online_dir, self._offline_dir, *keys)

    @classmethod
    def create(cls, directory: Directory, *, now: datetime) -> Self:
        """Create all keys and a repository without releases; `now` is aware, in UTC.

        Raises:
            UsageError: There is one already.
        """
        repository = cls(directory)
        if not repository._store.is_empty:
            raise UsageError(f"{repository._dir} holds a repository already")
        repository._dir.mkdir(parents=True, exist_ok=True)
        public: dict[str, list[Key]] = {role: [] for role in ROLES}
        for folder, names in ((repository._online_dir, ONLINE_KEYS), (repository._offline_dir, OFFLINE_KEYS)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in names:
                key = CryptoSigner(create_key(folder / f"{name}.pem")).public_key
                if (role := name.partition("-")[0]) in public:
                    public[role].append(key)
        with repository._store.locked():
            state = build_first_state(public, {COORDINATOR_KEY_TARGET: repository._build_key_target()})
            signed = {role: repository._sign(state, role, now) for role in ("root", *TARGETS_ROLES, "snapshot")}
            repository._store.save(signed | {"timestamp": repository._sign(state, "timestamp", now)}, state)
        return repository

    def sign_graphs(self, graphs: Mapping[str, FileEntry], *, now: datetime) -> None:
        """Sign graphs, by file name, as ones that devices may train with; signed ones need no key again.

        Raises:
            OfflineKeyError: The graphs key is not on this machine.
        """
        with self._store.locked():
            state = self._store.load()
            signed = state.targets[ROLE_GRAPHS].targets
            new = [_build_target(build_graph_target(entry.digest, name), entry) for name, entry in graphs.items()]
            added = {target.path: target for target in new if target.path not in signed}
            if added:
                signed.update(added)
                self._issue(state, {ROLE_GRAPHS}, now)

    def set_release(
        self,
        model: str,
        manifests: Mapping[Role, bytes],
        *,
        now: datetime,
        terms: Mapping[Role, ReleaseTerms] | None = None,
        kept: Collection[Role] = (),
    ) -> None:
        """Let each alias of `model` stand for a manifest; aliases not named stand for nothing from now on.

        Args:
            model: All manifests must be its.
            manifests: Manifest bytes by alias.
            now: Aware, in UTC.
            terms: What these aliases' versions are for; of others it is said that they are for all.
            kept: Aliases that stand for what they stood for.

        Raises:
            MalformedError: Bytes that are no manifest.
            UsageError: An unknown alias, a manifest of another model, or terms of another version.
        """
        released = {target.path: target for target in _build_releases(model, manifests, terms or {})}
        with self._store.locked():
            state = self._store.load()
            releases = state.targets[ROLE_RELEASES]
            mine = {build_release_target(model, alias) for alias in ALIASES.difference(kept)}
            changed = {path: target for path, target in releases.targets.items() if path not in mine} | released
            if changed != releases.targets:
                releases.targets = changed
                self._issue(state, {ROLE_RELEASES}, now)

    def refresh_expiring(self, now: datetime) -> tuple[str, ...]:
        """Sign again what has a quarter of its lifetime left or less, and what a change of keys that was cut short left.

        Returns:
            Roles that are due but whose keys are not within reach here; a person must act.
        """
        with self._store.locked():
            state = self._store.load()
            due = {role for role in ROLES if state.is_due(role, now)}
            key_target = self._build_key_target()
            if state.targets[ROLE_RELEASES].targets.get(COORDINATOR_KEY_TARGET) != key_target:
                state.targets[ROLE_RELEASES].targets[COORDINATOR_KEY_TARGET] = key_target
                due.add(ROLE_RELEASES)
            possible = {role for role in due if self._can_sign(state, role, now)}
            if possible:
                self._issue(state, possible, now)
            return tuple(role for role in ROLES if role in due - possible)

    def renew(self, roles: Sequence[str], *, now: datetime) -> None:
        """Sign `roles` again, whatever is left of their lifetimes.

        Raises:
            OfflineKeyError: A key is not within reach; nothing has changed.
        """
        with self._store.locked():
            self._issue(self._store.load(), set(roles), now)

    def outrun(self, roles: Sequence[str], *, now: datetime) -> None:
        """Sign `roles`, snapshot and timestamp with versions above any that devices can have seen; raises as `renew`.

        A restored repository goes on behind its fleet, which refuses what is older than it saw. The time in seconds is
        such a version, as a role is signed less than once a second. Roots follow one on the other: they cannot leap.
        """
        with self._store.locked():
            state = self._store.load()
            for signed in (state.snapshot, state.timestamp, *(state.targets[role] for role in roles)):
                signed.version = max(signed.version, int(now.timestamp()))
            self._issue(state, set(roles), now)

    def rotate(self, rotation: Rotation, *, now: datetime) -> list[Path]:
        """Replace keys; what the old ones sign from now on, devices refuse once they have seen the new root or targets.

        Returns:
            The files of the new keys, or what says where they are.

        Raises:
            OfflineKeyError: A key that must sign is not within reach; nothing has changed.
            UsageError: No key, or more than one, begins with the given id.
            ServerError: The external signer cannot be used.
        """
        with self._store.locked():
            state = self._store.load()
            root_before, due = copy.deepcopy(state.root), set[str]()
            created, replaced = list[Path](), list[str]()
            files_before = {path for place in (self._online_dir, self._new_offline_dir) for path in place.glob("*")}
            try:
                for role in rotation.roles:
                    old = _find_replaced(state, role, rotation)
                    folder = self._online_dir if role in ONLINE_ROLES else self._new_offline_dir
                    new = [_create(state, folder, role, rotation) for _ in old]
                    created += [path for _, path in new]
                    due |= state.replace_keys(role, old, [key for key, _ in new])
                    replaced += old
                signed = self._sign_next(state, due, now, root_before=root_before)
            except BaseException:
                for path in set(created) - files_before:
                    path.unlink(missing_ok=True)
                raise
            self._store.save(signed, state)
            self._ring.forget(replaced, self._online_dir)
            return created

    def rotate_order_key(self, *, now: datetime) -> list[Path]:
        """Replace the key that signs orders to devices; its file is returned."""
        with self._store.locked():
            state = self._store.load()
            create_key(self._order_key_path)  # a kill after this is made good by `refresh_expiring`
            state.targets[ROLE_RELEASES].targets[COORDINATOR_KEY_TARGET] = self._build_key_target()
            self._issue(state, {ROLE_RELEASES}, now)
            return [self._order_key_path]

    def describe(self) -> list[RoleStatus]:
        """Return who signs what."""
        with self._store.locked():
            state = self._store.load()
        return [
            RoleStatus(
                role=role,
                version=state.get_signed(role).version,
                expires=state.get_signed(role).expires,
                threshold=state.get_threshold(role),
                keys=tuple(
                    RoleKey(keyid=key.keyid, place=self._ring.find_place(key.keyid)) for key in state.list_keys(role)
                ),
            )
            for role in ROLES
        ]

    def find_signed_at(self) -> datetime | None:
        """Return when the newest timestamp was signed; None if it does not say."""
        with self._store.locked():
            return parse_signed_at(self._store.load().timestamp.unrecognized_fields)

    def load_metadata(self) -> dict[str, bytes]:
        """Return every file a client may need, by name: the contents of an offer."""
        with self._store.locked():
            return self._store.read_all()

    def load_root(self) -> bytes:
        """Return the newest root: what a device is given at enrolment."""
        return self._store.read_root()

    def build_floors(self) -> Floors:
        """Return what devices are told that no offer may be older than."""
        with self._store.locked():
            state = self._store.load()
        roles = {
            role: Floor(
                version=state.get_signed(role).version,
                keys=build_keys_digest(key.keyid for key in state.list_keys(role)),
            )
            for role in TOLD_ROLES
        }
        signed_at = parse_signed_at(state.timestamp.unrecognized_fields)
        return Floors(roles=roles, signed_at=signed_at or datetime.fromtimestamp(0, UTC))

    def build_coordinator_pem(self) -> bytes:
        """Return the public key that devices check orders with: the bytes of its target."""
        return build_public_pem(load_key(self._order_key_path).public_key())

    def _build_key_target(self) -> TargetFile:
        pem = self.build_coordinator_pem()
        return _build_target(COORDINATOR_KEY_TARGET, FileEntry(digest=build_digest(pem), size_bytes=len(pem)))

    def _issue(self, state: State, roles: set[str], now: datetime) -> None:
        """Publish new versions of `roles`, and of the snapshot and the timestamp, which say so."""
        self._store.save(self._sign_next(state, roles, now), state)

    def _sign_next(
        self, state: State, roles: set[str], now: datetime, *, root_before: Root | None = None
    ) -> dict[str, bytes]:
        for role in roles.intersection(TARGETS_ROLES):
            state.targets[role].version += 1
            state.snapshot.meta[f"{role}.json"] = MetaFile(state.targets[role].version)
        if "root" in roles:
            state.root.version += 1
        state.snapshot.version += 1
        state.timestamp.version += 1
        state.timestamp.snapshot_meta = MetaFile(state.snapshot.version)
        order = [role for role in ("root", *TARGETS_ROLES) if role in roles]
        return {
            role: self._sign(state, role, now, root_before=root_before) for role in (*order, "snapshot", "timestamp")
        }

    def _sign(self, state: State, role: str, now: datetime, *, root_before: Root | None = None) -> bytes:
        signed, delegator = state.get_signed(role), state.get_delegator(role)
        signed.expires = (now + LIFETIMES[role]).replace(microsecond=0)
        if role == "timestamp":
            signed.unrecognized_fields[SIGNED_AT_FIELD] = build_signed_at(now)
        metadata = Metadata[Any](signed)
        keys = {key.keyid: key for key in state.list_keys(role)}
        if role == "root" and root_before is not None:  # both must agree to a new root: its own keys and the old ones
            keys |= {keyid: root_before.get_key(keyid) for keyid in root_before.roles["root"].keyids}
        signers, failures = self._ring.find_signers(keys.values())
        for signer in signers:
            try:
                metadata.sign(signer, append=True)
            except UnsignedMetadataError as error:  # the others may be enough
                failures.append(str(error))
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
            if role == "root" and root_before is not None:
                root_before.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError as error:
            if failures:
                raise ServerError(f"{role} is not signed: {'; '.join(failures)}") from error
            raise OfflineKeyError(
                f"{error}: the others are not on this machine; run this where they are, or name their folder with --keys"
            ) from error
        for failure in failures:
            logger.warning("%s is signed without one of its keys: %s", role, failure)
        return metadata.to_bytes(JSONSerializer(compact=True))

    def _can_sign(self, state: State, role: str, now: datetime) -> bool:
        """Try it, as that a token is unplugged or a key service away shows no sooner: others must not expire for it."""
        try:
            self._sign(copy.deepcopy(state), role, now)
        except OfflineKeyError:
            return False
        except ServerError as error:
            logger.warning("%s", error)
            return False
        return True


def _find_replaced(state: State, role: str, rotation: Rotation) -> list[str]:
    found = [key.keyid for key in state.list_keys(role) if key.keyid.startswith(rotation.keyid)]
    if not found or (len(found) > 1 and (rotation.keyid or rotation.signer)):
        known = ", ".join(key.keyid[:KEYID_SHOWN] for key in state.list_keys(role))
        raise UsageError(f"{len(found)} keys of {role} are meant, of {known}: say which one with --key")
    return found


def _create(state: State, folder: Path, role: str, rotation: Rotation) -> tuple[Key, Path]:
    if rotation.signer is None:
        return create_role_key(folder, role)
    uri, public_key_path = rotation.signer
    known = [key.keyid for key in state.list_keys(role)]
    return save_external(folder, role, uri=uri, public_key_path=public_key_path, known=known)


def _build_target(path: str, entry: FileEntry, custom: dict[str, object] | None = None) -> TargetFile:
    fields = {} if custom is None else {"custom": custom}
    return TargetFile(entry.size_bytes, {"sha256": entry.digest}, path, unrecognized_fields=fields)


def _build_releases(
    model: str, manifests: Mapping[Role, bytes], known: Mapping[Role, ReleaseTerms]
) -> Iterator[TargetFile]:
    for alias, data in manifests.items():
        manifest = parse_manifest(data)
        if alias not in ALIASES:
            raise UsageError(f"alias {alias!r} is none of {', '.join(sorted(ALIASES))}")
        if manifest.model != model:
            raise UsageError(f"the {alias} is a manifest of {manifest.model!r}, not of {model!r}")
        split = Split() if alias == "challenger" else None
        terms = known.get(alias) or ReleaseTerms(role=alias, version=manifest.version, split=split)
        if (terms.role, terms.version) != (alias, manifest.version):
            raise UsageError(
                f"the {alias} is version {manifest.version}, its terms are of the {terms.role}, version {terms.version}"
            )
        entry = FileEntry(digest=build_digest(data), size_bytes=len(data))
        yield _build_target(build_release_target(model, alias), entry, build_terms(terms))
