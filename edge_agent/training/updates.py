"""The last noised update, kept so that a retry sends the same bytes and costs nothing."""

from pathlib import Path

from edge_agent.errors import StalledError
from models.contract.files import save_atomically, sync_directory

_SUFFIX = ".update"  # the bytes that were sent, or were about to be


class UpdateStore:
    """One update at most, named after its run and round: a coordinator asks again only for the round it is in."""

    def __init__(self, directory: Path) -> None:
        """Keep it in `directory`, which is made if it is not there; raises StalledError."""
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(directory.parent)
        except OSError as error:
            raise StalledError(f"{directory}: {error.strerror}") from error

    def find(self, run: str, number: int) -> bytes | None:
        """Return the update of round `number` of `run`, if it is the one kept."""
        path = self._path(run, number)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StalledError(f"{path}: {error.strerror}") from error

    def save(self, run: str, number: int, update: bytes) -> None:
        """Keep `update` in place of any other; durable on return."""
        path = self._path(run, number)
        try:
            save_atomically(path, update, mode=0o600)
            self._remove_all_but(path.name)
        except OSError as error:
            raise StalledError(f"{path}: {error.strerror}") from error

    def remove_other_runs(self, run: str) -> None:
        """Remove what is kept for another run, and what a killed process left half written."""
        kept = [path.name for path in self._directory.glob(f"*{_SUFFIX}") if path.name.rsplit(".", 2)[0] == run]
        self._remove_all_but(*kept)

    def _path(self, run: str, number: int) -> Path:
        return self._directory / f"{run}.{number}{_SUFFIX}"

    def _remove_all_but(self, *names: str) -> None:
        for path in self._directory.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)
