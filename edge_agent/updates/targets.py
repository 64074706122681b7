"""What the verified metadata of an offer signs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from edge_agent.errors import StalledError

if TYPE_CHECKING:
    from models.contract.manifest import FileEntry
    from models.contract.terms import ReleaseTerms

SignedTarget: TypeAlias = tuple[str, int, Any]  # digest, size in bytes and `custom`, which may be anything


@dataclass(frozen=True, slots=True)
class SignedTargets:
    """The targets of one offer by path."""

    signed: Mapping[str, SignedTarget]

    def find_target(self, path: str) -> "FileEntry | None":
        """Return digest and size that are signed for the target `path`; None if there is no such target."""
        from models.contract.manifest import FileEntry  # brings NumPy, which the process that verifies needs not

        if path not in self.signed:
            return None
        digest, size_bytes, _ = self.signed[path]
        try:
            return FileEntry(digest=digest, size_bytes=size_bytes)
        except ValueError as error:
            raise StalledError(f"target {path} is signed without a usable digest and size: {error}") from error

    def parse_terms(self, path: str) -> "ReleaseTerms":
        """Return the terms that are signed for `path`, a release; raises MalformedError."""
        from models.contract.terms import parse_terms

        return parse_terms(self.signed[path][2])
