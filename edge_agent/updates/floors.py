"""The oldest offer that a device still accepts, kept beside the folder of what is trusted, not in it.

So a folder that was wiped opens no rollback, and a clock that was set back makes nothing valid that had expired.
A floor holds under the keys that made it: what a thief had signed binds nobody once a newer root has replaced the keys.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from edge_agent.errors import StalledError
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.offer import ROLE_GRAPHS, ROLE_RELEASES, parse_signed_at

_MAX_BYTES = 8192
_ROLES = ("root", "timestamp", "snapshot", "targets", ROLE_RELEASES, ROLE_GRAPHS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Of one role: its version, and the digest of the ids of the keys that may sign it."""

    version: int
    keys: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """What the newest accepted offer was.

    Attributes:
        signed_at: The newest signed time, UTC; it is no earlier now, whatever the clock says.
    """

    roles: dict[str, Floor]
    signed_at: datetime


def raise_floors(path: Path, metadata_dir: Path, *, now: datetime) -> None:
    """Hold what an offer led to against the floors in `path`, and raise them to it.

    Args:
        path: Of the floors; the first offer makes them.
        metadata_dir: The verified metadata that the offer led to, as ngclient leaves it.
        now: What the clock says, aware.

    Raises:
        StalledError: The offer is older than one before it, or has expired; the floors are unchanged.
    """
    metadata = {role: Metadata[Any].from_file(str(metadata_dir / f"{role}.json")) for role in _ROLES}
    found, floors = _read(metadata), _load(path)
    if floors is not None:
        _check_versions(found, floors)
        if found.roles["timestamp"].keys == floors.roles["timestamp"].keys:
            found = replace(found, signed_at=max(found.signed_at, floors.signed_at))
    reference = max(now, found.signed_at)
    for role, document in metadata.items():
        if document.signed.is_expired(reference):
            raise StalledError(f"offer refused: {role}.json is expired, it is {reference:%Y-%m-%d %H:%M}Z or later")
    if found != floors:
        save_atomically(path, build_json(found))


def load_signed_at(path: Path) -> datetime | None:
    """Return the newest signed time in the floors at `path`; None if no offer made any. Raises StalledError."""
    floors = _load(path)
    return None if floors is None else floors.signed_at


def _check_versions(found: Floors, floors: Floors) -> None:
    for role, floor in floors.roles.items():
        new = found.roles[role]
        is_bound = role == "root" or new.keys == floor.keys
        if is_bound and new.version < floor.version:
            raise StalledError(
                f"offer refused: {role} version {new.version} is older than {floor.version}, seen before"
            )


def _read(metadata: dict[str, Metadata[Any]]) -> Floors:
    delegators = {role: metadata["targets" if role in {ROLE_RELEASES, ROLE_GRAPHS} else "root"] for role in _ROLES}
    roles = {}
    for role, delegator in delegators.items():
        keyids = sorted(delegator.signed.get_delegated_role(role).keyids)
        roles[role] = Floor(version=metadata[role].signed.version, keys=build_digest(" ".join(keyids).encode()))
    signed_at = parse_signed_at(metadata["timestamp"].signed.unrecognized_fields)
    return Floors(roles=roles, signed_at=signed_at or datetime.fromtimestamp(0, UTC))


def _load(path: Path) -> Floors | None:
    try:
        return parse_json(path.read_bytes(), Floors, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return None
    except ContractError as error:  # guessing would open a rollback
        raise StalledError(f"{path} is unreadable, so no offer can be told from an older one: {error}") from error
