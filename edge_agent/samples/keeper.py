"""Opens the store on the first sample: a disk that is full or damaged must not keep a model from serving."""

import threading
from collections.abc import Sequence
from pathlib import Path

from edge_agent.errors import RequestError, StalledError
from edge_agent.samples.store import Sample, SampleStore, open_samples


class SampleKeeper:
    """The store at `path`, whether or not it can be opened now; may be used from several threads."""

    def __init__(self, path: Path, *, max_count: int) -> None:
        self._path = path
        self._max_count = max_count
        self._lock = threading.Lock()
        self._store: SampleStore | None = None

    def add(self, samples: Sequence[Sample]) -> list[int]:
        """Keep `samples` as `SampleStore.add` does; a store that cannot be opened is a RequestError too."""
        try:
            return self._open().add(samples)
        except StalledError as error:
            raise RequestError(str(error), status=507) from error

    def count(self) -> int | None:
        """Return how many samples there are; None if their file cannot be opened."""
        try:
            return self._open().count()
        except StalledError:
            return None

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _open(self) -> SampleStore:
        with self._lock:
            if self._store is None:
                self._store = open_samples(self._path, max_count=self._max_count)
            return self._store
