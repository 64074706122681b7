"""The oldest offer that a device still accepts, kept beside the folder of what is trusted, not in it.

So a folder that was wiped opens no rollback, and a clock that was set back makes nothing valid that had expired.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from edge_agent.errors import StalledError
from edge_agent.updates.told_floors import load_floors
from models.contract.encoding import build_json
from models.contract.files import save_atomically
from models.contract.floors import Floor, Floors, build_keys_digest
from models.contract.offer import ROLE_GRAPHS, ROLE_RELEASES, parse_signed_at

_ROLES = ("root", "timestamp", "snapshot", "targets", ROLE_RELEASES, ROLE_GRAPHS)


def raise_floors(path: Path, metadata_dir: Path, *, told: Sequence[Path], now: datetime) -> None:
    """Hold what an offer led to against all floors, and raise those in `path` to it.

    Args:
        path: Of the floors that offers made; the first one makes the file.
        metadata_dir: The verified metadata that the offer led to, as ngclient leaves it.
        told: Of floors that the coordinator told; those that are not there tell nothing.
        now: What the clock says, aware.

    Raises:
        StalledError: The offer is older than one before it or than it must be, or has expired; the floors are
            unchanged.
    """
    metadata = {role: Metadata[Any].from_file(str(metadata_dir / f"{role}.json")) for role in _ROLES}
    found, seen = _read(metadata), load_floors(path)
    for floors in (seen, *map(load_floors, told)):
        if floors is not None:
            _check_versions(found, floors, "seen before" if floors is seen else "told by the coordinator")
            if found.is_time_of(floors):
                found = replace(found, signed_at=max(found.signed_at, floors.signed_at))
    reference = max(now, found.signed_at)
    for role, document in metadata.items():
        if document.signed.is_expired(reference):
            raise StalledError(f"offer refused: {role}.json is expired, it is {reference:%Y-%m-%d %H:%M}Z or later")
    if found != seen:
        save_atomically(path, build_json(found))


def load_signed_at(path: Path) -> datetime | None:
    """Return the newest signed time in the floors at `path`; None if no offer made any. Raises StalledError."""
    floors = load_floors(path)
    return None if floors is None else floors.signed_at


def _check_versions(found: Floors, floors: Floors, whence: str) -> None:
    for role, floor in floors.roles.items():
        new = found.roles.get(role)
        if new is None:  # a role of a later release
            continue
        is_bound = role == "root" or new.keys == floor.keys
        if is_bound and new.version < floor.version:
            raise StalledError(f"offer refused: {role} version {new.version} is older than {floor.version}, {whence}")


def _read(metadata: dict[str, Metadata[Any]]) -> Floors:
    delegators = {role: metadata["targets" if role in {ROLE_RELEASES, ROLE_GRAPHS} else "root"] for role in _ROLES}
    roles = {}
    for role, delegator in delegators.items():
        keyids = delegator.signed.get_delegated_role(role).keyids
        roles[role] = Floor(version=metadata[role].signed.version, keys=build_keys_digest(keyids))
    signed_at = parse_signed_at(metadata["timestamp"].signed.unrecognized_fields)
    return Floors(roles=roles, signed_at=signed_at or datetime.fromtimestamp(0, UTC))
