"""Opens the store on the first sample: a disk that is full or damaged, or a lost key, must not keep a model from serving."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from edge_agent.errors import RequestError, StalledError
from edge_agent.samples.database import Reserve
from edge_agent.samples.keys import MissingKeyError
from edge_agent.samples.sealing import Opened, Sample, SealError
from edge_agent.samples.store import Retention, SampleStore, open_samples


class SampleKeeper:
    """The store at `path`, whether or not it can be opened now; may be used from several threads."""

    def __init__(self, path: Path, *, model: str, load_key: Callable[[bool], bytes], retention: Retention) -> None:
        """Prepare; nothing is opened.

        Args:
            path: Of the store.
            model: What its new samples are of.
            load_key: Gives the key, and makes it if it is asked to and can; raises StalledError.
            retention: How much is kept.
        """
        self._path = path
        self._model = model
        self._load_key = load_key
        self._retention = retention
        self._lock = threading.Lock()
        self._store: SampleStore | None = None
        self._key: bytes | None = None

    def add(self, samples: Sequence[Sample], fields: Sequence[Mapping[str, str]] = ()) -> list[int]:
        """Keep `samples` as `SampleStore.add` does; a store that cannot be opened or unlocked is a RequestError too."""
        try:
            return self._unlock().add(samples, fields)
        except SealError as error:
            raise RequestError(str(error), status=503) from error
        except StalledError as error:
            raise RequestError(str(error), status=507) from error

    def count(self, *, after: int = 0) -> int | None:
        """Return how many samples there are that came after the one with id `after`; None if their file cannot be opened."""
        try:
            return self._open().count(after=after)
        except StalledError:
            return None

    def find_newest(self) -> int:
        """Return the id of the newest sample there ever was, 0 before the first; raises StalledError."""
        return self._unlock().find_newest()

    def find(self, matches: Callable[[Opened], bool]) -> list[int]:
        """Return the ids of the samples that `matches` says yes to; raises StalledError."""
        return self._unlock().find(matches)

    def forget(self, ids: Iterable[int] | None) -> int:
        """Delete samples as `SampleStore.forget` does; raises StalledError, too."""
        if not self._path.exists():
            return 0
        try:
            store = self._open()
        except StalledError:  # a full disk has no room for SQLite's own files
            with Reserve(self._path).lend():
                store = self._open()
        return store.forget(ids)

    def forget_old(self) -> int:
        """Delete what is kept for no longer, and seal what an earlier release left; raises StalledError or TransientError."""
        if not self._path.exists():
            return 0
        store = self._open()
        if not store.has_key and store.count():
            self._unlock()
        return store.forget_old()

    def load_key(self) -> bytes:
        """Return the key of the samples, for the process that trains on them; raises StalledError."""
        self._unlock()
        assert self._key is not None
        return self._key

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _open(self) -> SampleStore:
        with self._lock:
            if self._store is None:
                self._store = open_samples(self._path, model=self._model, retention=self._retention)
            return self._store

    def _unlock(self) -> SampleStore:
        store = self._open()
        with self._lock:
            if store.is_locked:
                try:
                    key = self._load_key(not store.has_key)
                except MissingKeyError as error:
                    raise SealError(
                        f"{error}: {self._path} is sealed with it; bring it back, or begin anew with "
                        "`edge-agent forget --all`"
                    ) from error
                except StalledError as error:
                    raise SealError(f"the samples cannot be sealed: {error}") from error
                store.unlock(key)
                self._key = key
        return store
