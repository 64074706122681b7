"""Who may sign what in a fleet's repository; pure.

    root (2 of 3, offline) -> targets (offline) -+-> releases (online): champions, coordinator key
                           -> snapshot (online)  `-> graphs (offline): the graphs that hold the clipping
                           -> timestamp (online)

The top-level targets only delegate, so that a stolen online key cannot claim the graphs for itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from securesystemslib.signer import Key
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from models.contract.offer import ROLE_GRAPHS, ROLE_RELEASES

ROOT_THRESHOLD = 2
LIFETIMES = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    ROLE_GRAPHS: timedelta(days=365),
    ROLE_RELEASES: timedelta(days=7),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(hours=24),
}
ROLES = tuple(LIFETIMES)
ONLINE_ROLES = (ROLE_RELEASES, "snapshot", "timestamp")
TARGETS_ROLES = ("targets", ROLE_RELEASES, ROLE_GRAPHS)
_DELEGATED_PATHS = {ROLE_RELEASES: ["releases/*/*/*", "keys/*"], ROLE_GRAPHS: ["graphs/*/*"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The current repository; what hangs on it is changed in place before it is issued.

    Attributes:
        targets: By role: "targets" and the two it delegates to.
        unsigned: Roles whose metadata on disk is not signed by whom it must be: a change of keys was cut short.
    """

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: dict[str, Targets]
    unsigned: frozenset[str] = frozenset()

    def get_signed(self, role: str) -> Signed:
        top: dict[str, Signed] = {"root": self.root, "timestamp": self.timestamp, "snapshot": self.snapshot}
        return top[role] if role in top else self.targets[role]

    def get_delegator(self, role: str) -> Root | Targets:
        """Return the metadata that says whose signatures `role` needs."""
        return self.targets["targets"] if role in _DELEGATED_PATHS else self.root

    def get_threshold(self, role: str) -> int:
        return self.get_delegator(role).get_delegated_role(role).threshold

    def list_keys(self, role: str) -> list[Key]:
        """Return the public keys whose signatures count for `role`."""
        delegator = self.get_delegator(role)
        return [delegator.get_key(keyid) for keyid in delegator.get_delegated_role(role).keyids]

    def is_due(self, role: str, now: datetime) -> bool:
        """Return whether `role` has a quarter of its lifetime left or less, or is not signed as it must be."""
        return role in self.unsigned or self.get_signed(role).expires - now <= LIFETIMES[role] / 4

    def replace_keys(self, role: str, old: Collection[str], new: Sequence[Key]) -> set[str]:
        """Let `new` sign `role` instead of the keys with the ids `old`; return the roles to be signed anew for it."""
        delegator = self.get_delegator(role)
        for key in new:
            delegator.add_key(key, role)
        for keyid in old:
            delegator.revoke_key(keyid, role)
        return {role, "targets" if delegator is not self.root else "root"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleKey:
    """A key that signs a role.

    Attributes:
        place: Its file or signer URI; None if it is not within reach.
    """

    keyid: str
    place: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStatus:
    """Who signs a role, and until when what they signed holds."""

    role: str
    version: int
    expires: datetime
    threshold: int
    keys: tuple[RoleKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Which keys are replaced, and by what.

    Attributes:
        roles: Whose keys.
        keyid: How the id of the only key to replace begins; "" replaces every key of the roles.
        signer: URI of an external signer that takes over, and the file of its public key; None makes new key files.
    """

    roles: tuple[str, ...]
    keyid: str = ""
    signer: tuple[str, Path] | None = None


def build_first_state(keys: Mapping[str, Sequence[Key]], first_targets: Mapping[str, TargetFile]) -> State:
    """Return a repository that has released nothing but `first_targets`; `keys` names all of `ROLES`."""
    root = Root(version=1, consistent_snapshot=True)
    for role in ("root", "targets", "snapshot", "timestamp"):
        for key in keys[role]:
            root.add_key(key, role)
    root.roles["root"].threshold = ROOT_THRESHOLD
    delegated = {
        role: DelegatedRole(role, [key.keyid for key in keys[role]], threshold=1, terminating=True, paths=paths)
        for role, paths in _DELEGATED_PATHS.items()
    }
    known = {key.keyid: key for role in _DELEGATED_PATHS for key in keys[role]}
    targets = {
        "targets": Targets(version=1, delegations=Delegations(known, delegated)),
        ROLE_RELEASES: Targets(version=1, targets=dict(first_targets)),
        ROLE_GRAPHS: Targets(version=1),
    }
    return State(
        root=root,
        timestamp=Timestamp(version=1, snapshot_meta=MetaFile(1)),
        snapshot=Snapshot(version=1, meta={f"{role}.json": MetaFile(1) for role in TARGETS_ROLES}),
        targets=targets,
    )
