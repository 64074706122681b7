"""What the verified metadata of an offer signs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_agent.errors import StalledError

if TYPE_CHECKING:
    from models.contract.manifest import FileEntry


@dataclass(frozen=True, slots=True)
class SignedTargets:
    """The targets of one offer: digest and size of each by its path."""

    signed: Mapping[str, tuple[str, int]]

    def find_target(self, path: str) -> "FileEntry | None":
        """Return digest and size that are signed for the target `path`; None if there is no such target."""
        from models.contract.manifest import FileEntry  # brings NumPy, which the process that verifies needs not

        if path not in self.signed:
            return None
        digest, size_bytes = self.signed[path]
        try:
            return FileEntry(digest=digest, size_bytes=size_bytes)
        except ValueError as error:
            raise StalledError(f"target {path} is signed without a usable digest and size: {error}") from error
