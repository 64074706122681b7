"""Floors that the coordinator has told this device, in a file beside those of the offers it saw.

They reach a device that was wiped, or that a broker shows an older offer than its coordinator has signed.
"""

from dataclasses import replace
from pathlib import Path

from edge_agent.errors import StalledError
from models.contract.encoding import build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.floors import TOLD_ROLES, Floor, Floors

TOLD_NAME = "tuf-told.json"
_MAX_BYTES = 8192


def load_floors(path: Path) -> Floors | None:
    """Return the floors in `path`, None if there is no such file.

    Raises:
        StalledError: They are unreadable.
    """
    try:
        return parse_json(path.read_bytes(), Floors, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ContractError) as error:  # guessing would open a rollback
        raise StalledError(f"{path} is unreadable, so no offer can be told from an older one: {error}") from error


def keep_told(path: Path, told: Floors) -> None:
    """Raise the floors in `path` to what a signed command told; those under the same keys never fall.

    Only of online roles: whoever stole the key that signs commands must not be able to set what no rotation of online
    keys undoes.

    Raises:
        StalledError: The file cannot be read or written.
    """
    known = load_floors(path)
    roles = {role: floor for role, floor in told.roles.items() if role in TOLD_ROLES}
    if known is not None:
        roles = {role: _raise(known.roles.get(role), floor) for role, floor in roles.items()}
        if told.is_time_of(known):
            told = replace(told, signed_at=max(told.signed_at, known.signed_at))
    told = replace(told, roles=roles)
    if told != known:
        try:
            save_atomically(path, build_json(told))
        except OSError as error:
            raise StalledError(f"{path}: {error.strerror or error}") from error


def _raise(known: Floor | None, told: Floor) -> Floor:
    return known if known is not None and known.keys == told.keys and known.version > told.version else told
