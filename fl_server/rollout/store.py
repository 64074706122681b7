"""The files of a signed repository: loaded as one state, saved so that a kill leaves the old one or the new one.

Versioned files are written first and `timestamp.json` last: what `timestamp.json` leads to is the repository,
and a kill between two files leaves nothing but files that nobody refers to. Only a new root counts at once.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError, StorageError, UnsignedMetadataError
from tuf.api.metadata import Metadata

from fl_server.errors import ServerError, UsageError
from fl_server.rollout.trust import TARGETS_ROLES, State
from models.contract.files import save_atomically


class Store:
    """The metadata in one folder."""

    def __init__(self, directory: Path) -> None:
        self._dir = directory

    @property
    def is_empty(self) -> bool:
        return not (self._dir / "timestamp.json").exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep another process (an operator's command) from changing the repository meanwhile; raises UsageError as `load`."""
        try:
            descriptor = os.open(self._dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError as error:
            raise self._build_missing() from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def load(self) -> State:
        """Return the current repository; raises UsageError if there is none, ServerError if a file of it is damaged."""
        loaded = {"root": self._load(f"{self.find_root_version()}.root"), "timestamp": self._load("timestamp")}
        loaded["snapshot"] = self._load(f"{loaded['timestamp'].signed.snapshot_meta.version}.snapshot")
        for role in TARGETS_ROLES:
            loaded[role] = self._load(f"{loaded['snapshot'].signed.meta[f'{role}.json'].version}.{role}")
        state = State(
            root=loaded["root"].signed,
            timestamp=loaded["timestamp"].signed,
            snapshot=loaded["snapshot"].signed,
            targets={role: loaded[role].signed for role in TARGETS_ROLES},
        )
        unsigned = (role for role, metadata in loaded.items() if not _is_signed(state, role, metadata))
        return replace(state, unsigned=frozenset(unsigned))

    def save(self, signed: Mapping[str, bytes], state: State) -> None:
        """Write in the order given, which ends with the timestamp, and drop what nobody refers to any more."""
        for role, data in signed.items():
            name = "timestamp.json" if role == "timestamp" else f"{state.get_signed(role).version}.{role}.json"
            save_atomically(self._dir / name, data)
        current = {f"{state.get_signed(role).version}.{role}.json" for role in (*TARGETS_ROLES, "snapshot")}
        for path in self._dir.glob("*.json"):
            if path.name not in current and path.name != "timestamp.json" and not path.name.endswith(".root.json"):
                path.unlink()

    def read_all(self) -> dict[str, bytes]:
        """Return every file a client may need, by name."""
        state = self.load()
        chain = [f"{version}.root.json" for version in range(1, state.root.version + 1)]
        roles = [f"{state.get_signed(role).version}.{role}.json" for role in ("snapshot", *TARGETS_ROLES)]
        return {name: (self._dir / name).read_bytes() for name in (*chain, "timestamp.json", *roles)}

    def read_root(self) -> bytes:
        """Return the newest root."""
        return (self._dir / f"{self.find_root_version()}.root.json").read_bytes()

    def find_root_version(self) -> int:
        versions = [int(path.name.split(".")[0]) for path in self._dir.glob("[0-9]*.root.json")]
        if not versions or self.is_empty:
            raise self._build_missing()
        return max(versions)

    def _build_missing(self) -> UsageError:
        return UsageError(f"{self._dir} holds no repository; create one with fl-server init")

    def _load(self, name: str) -> Metadata[Any]:
        path = self._dir / f"{name}.json"
        try:
            return Metadata[Any].from_file(str(path))
        except (RepositoryError, StorageError) as error:
            raise ServerError(f"{path}: {error}; restore it from a backup") from error


def _is_signed(state: State, role: str, metadata: Metadata[Any]) -> bool:
    try:
        state.get_delegator(role).verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError:
        return False
    return True
