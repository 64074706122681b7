"""The third slot: a challenger beside the champion's two, which it never touches.

    slots/c/                  manifest.json and the files it names
    slots/challenger.json     what the slot holds, what it is for, and whether it has proved itself

The slot is written only after `challenger.json` says that it holds nothing; one atomic rename says that it does.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edge_agent.errors import StalledError
from edge_agent.updates.folders import clear_slot, fill_slot, load_manifest
from edge_agent.updates.slots import REJECTED_MAX, TRIES
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.manifest import FileEntry, ModelManifest, parse_manifest
from models.contract.terms import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the slot holds.

    Attributes:
        split: What the release lets it do.
        tries_left: Falls before each try and each start; all are back once the version has served for a while.
        is_proven: Whether it has answered.
    """

    digest: str
    version: int
    split: Split
    tries_left: int = TRIES
    is_proven: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenger:
    """A challenger in its slot, verified when it was loaded."""

    manifest: ModelManifest
    directory: Path
    split: Split
    is_proven: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    schema_version: Literal[1] = 1
    held: Held | None = None
    rejected: tuple[str, ...] = field(default_factory=tuple)


class ChallengerSlot:
    """Slot c under the directory of all slots; one process uses it.

    Attributes:
        damage: What was found broken at the start, one line each.
    """

    def __init__(self, slots_dir: Path) -> None:
        self._dir, self._path = slots_dir / "c", slots_dir / "challenger.json"
        self.damage: list[str] = []
        self._state = self._load_state()

    @property
    def held(self) -> Held | None:
        return self._state.held

    @property
    def rejected(self) -> frozenset[str]:
        return frozenset(self._state.rejected)

    def stage(
        self, manifest: bytes, names: Iterable[str], read: Callable[[FileEntry], Iterator[bytes]], split: Split
    ) -> None:
        """Write a version to the slot and arm its trial; arguments and errors are those of `fill_slot`."""
        self._dir.mkdir(parents=True, exist_ok=True)
        self._save(replace(self._state, held=None))
        fill_slot(self._dir, manifest, names, read)
        version = parse_manifest(manifest).version
        self._save(replace(self._state, held=Held(digest=build_digest(manifest), version=version, split=split)))

    def set_split(self, split: Split) -> None:
        """Let the version do something else from now on, with all its tries."""
        self._save(replace(self._state, held=replace(self.get_held(), split=split, tries_left=TRIES)))

    def begin_try(self) -> Challenger:
        """Take one of the version's tries, on disk, and return it.

        Raises:
            StalledError: There is no version, or the slot does not verify any more; drop it.
        """
        held = self.get_held()
        manifest = load_manifest(self._dir, held.digest)
        self._save(replace(self._state, held=replace(held, tries_left=held.tries_left - 1)))
        return Challenger(manifest=manifest, directory=self._dir, split=held.split, is_proven=held.is_proven)

    def prove(self) -> None:
        """Remember that the version has answered."""
        held = self.get_held()
        if not held.is_proven:
            self._save(replace(self._state, held=replace(held, is_proven=True)))

    def give_back_tries(self) -> None:
        """Begin anew: nothing was found out about the version, or nothing bad for a while."""
        self._save(replace(self._state, held=replace(self.get_held(), tries_left=TRIES)))

    def reject(self) -> None:
        """Drop the version, and remember never to try it again."""
        rejected = (*self._state.rejected, self.get_held().digest)[-REJECTED_MAX:]
        self._save(replace(self._state, held=None, rejected=rejected))
        clear_slot(self._dir)

    def drop(self) -> None:
        """Hold nothing any more."""
        self._save(replace(self._state, held=None))
        clear_slot(self._dir)

    def get_held(self) -> Held:
        """Return what the slot holds; raises StalledError if that is nothing."""
        if self._state.held is None:
            raise StalledError("there is no challenger")
        return self._state.held

    def _load_state(self) -> _State:
        try:
            return parse_json(self._path.read_bytes(), _State)
        except FileNotFoundError:
            return _State()
        except (OSError, ContractError) as error:  # the next offer brings it again
            self.damage.append(f"slots/challenger.json is unreadable: {error}")
            return _State()

    def _save(self, state: _State) -> None:
        save_atomically(self._path, build_json(state))
        self._state = state
