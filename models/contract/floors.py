"""The oldest release metadata that a device accepts: what it has seen, and what the coordinator has told it.

A floor holds under the keys that made it: what a thief had signed binds nobody once those keys are replaced.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from models.contract.encoding import build_digest
from models.contract.offer import ROLE_RELEASES

FLOORS_NAME = "floors.json"  # in an enrolment bundle, beside the root of trust
TOLD_ROLES = ("timestamp", "snapshot", ROLE_RELEASES)  # the online ones: the key that tells of floors is online too


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Of one role: its version, and the digest of the ids of the keys that may sign it."""

    version: int
    keys: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """What the newest offer was.

    Attributes:
        signed_at: The newest signed time, UTC; it is no earlier now, whatever the clock says.
    """

    roles: dict[str, Floor]
    signed_at: datetime

    def is_time_of(self, other: "Floors") -> bool:
        """Return whether one timestamp key signed both times, so that the later one holds."""
        mine, theirs = self.roles.get("timestamp"), other.roles.get("timestamp")
        return mine is not None and theirs is not None and mine.keys == theirs.keys


def build_keys_digest(keyids: Iterable[str]) -> str:
    """Return what `Floor.keys` is for keys of these ids."""
    return build_digest(" ".join(sorted(keyids)).encode())
