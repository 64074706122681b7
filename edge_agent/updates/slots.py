"""Two places for a model version, of which one is active; a power cut at any moment leaves it whole.

    slots/a/ slots/b/     manifest.json and the files it names
    slots/state.json      which slot is active, what the other one holds, what is on trial

Only the slot that is not active is ever written, and only after `state.json` says that it holds nothing.
Changing over is the one atomic rename of `state.json`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from edge_agent.errors import StalledError
from edge_agent.updates.folders import fill_slot, find_file, load_manifest
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.manifest import FileEntry, ModelManifest
from models.contract.terms import ProbationRules

TRIES = 3
REJECTED_MAX = 64  # the newest are remembered; a broker cannot make this grow
SlotName: TypeAlias = Literal["a", "b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A model version in a slot, verified when it was loaded."""

    manifest: ModelManifest
    digest: str
    slot: SlotName
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    slot: SlotName
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A staged version that has not proved itself.

    Attributes:
        tries_left: Falls before each try.
        rules: What it must show.
    """

    slot: SlotName
    digest: str
    tries_left: int
    rules: ProbationRules = field(default_factory=ProbationRules)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    schema_version: Literal[1] = 1
    active: _Content | None = None
    previous: _Content | None = None
    trial: Trial | None = None
    rejected: tuple[str, ...] = field(default_factory=tuple)


class Slots:
    """The two slots under one directory; one process uses it.

    Attributes:
        active: The version to serve.
        damage: What was found broken at the start, one line each.
    """

    def __init__(self, directory: Path) -> None:
        """Load the state; an active version that does not verify gives way to the previous one."""
        self._dir = directory
        self.damage: list[str] = []
        for name in ("a", "b"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):  # of a kill while the state was saved
            leftover.unlink()
        self._state = self._load_state()
        self.active = self._verify_active()

    @property
    def trial(self) -> Trial | None:
        return self._state.trial

    @property
    def rejected(self) -> frozenset[str]:
        return frozenset(self._state.rejected)

    def find(self, entry: FileEntry, name: str) -> Path | None:
        """Return where a slot, be it the challenger's, holds the file `name` as `entry` says, to the bit."""
        return find_file(self._dir, entry, name)

    def stage(
        self,
        manifest: bytes,
        names: Iterable[str],
        read: Callable[[FileEntry], Iterator[bytes]],
        rules: ProbationRules | None = None,
    ) -> None:
        """Write a version to the idle slot and arm its trial.

        Args:
            manifest: Its bytes, verified.
            names: The files of it that this device needs.
            read: Yields the content of one that no slot has.
            rules: What it must show; None for what every version must.

        Raises:
            OSError: The disk is full or broken; what was written is removed, the active version is untouched.
            TransientError: A file is not what the manifest says.
        """
        slot: SlotName = "b" if self.active is not None and self.active.slot == "a" else "a"
        if self._state.previous is not None or self._state.trial is not None:
            self._save(replace(self._state, previous=None, trial=None))
        fill_slot(self._dir / slot, manifest, names, read)
        trial = Trial(slot=slot, digest=build_digest(manifest), tries_left=TRIES, rules=rules or ProbationRules())
        self._save(replace(self._state, trial=trial))

    def begin_try(self) -> Version:
        """Take one of the trial's tries, on disk, and return the version to try.

        Raises:
            StalledError: None is left, or the slot does not verify any more; roll back or drop it.
        """
        trial = self.get_trial()
        if trial.tries_left < 1:
            raise StalledError(f"it ended the agent {TRIES} times")
        self._save(replace(self._state, trial=replace(trial, tries_left=trial.tries_left - 1)))
        return _load_version(self._dir, trial.slot, trial.digest)

    def give_back_try(self) -> None:
        """Hold the last try against nobody: it did not come to its end, and not for the version's fault."""
        trial = self.get_trial()
        self._save(replace(self._state, trial=replace(trial, tries_left=min(trial.tries_left + 1, TRIES))))

    def commit(self) -> Version:
        """Make the version on trial the active one; the one it replaces stays as the previous one."""
        trial = self.get_trial()
        version = _load_version(self._dir, trial.slot, trial.digest)
        active = _Content(slot=trial.slot, digest=trial.digest)
        self._save(replace(self._state, active=active, previous=self._state.active, trial=None))
        self.active = version
        return version

    def roll_back(self) -> None:
        """End the trial, and remember never to try its version again; the active version is as it was."""
        trial = self.get_trial()
        rejected = [digest for digest in self._state.rejected if digest != trial.digest]
        self._save(replace(self._state, trial=None, rejected=(*rejected, trial.digest)[-REJECTED_MAX:]))

    def drop_trial(self) -> None:
        """End the trial without a verdict: its files are damaged, the version may be staged again."""
        self._save(replace(self._state, trial=None))

    def get_trial(self) -> Trial:
        """Return the trial under way; raises StalledError if there is none."""
        if self._state.trial is None:
            raise StalledError("no version is on trial")
        return self._state.trial

    def _load_state(self) -> _State:
        try:
            return parse_json((self._dir / "state.json").read_bytes(), _State)
        except FileNotFoundError:
            return _State()
        except (OSError, ContractError) as error:
            self.damage.append(f"slots/state.json is unreadable: {error}")
            return _State()

    def _verify_active(self) -> Version | None:
        for content in (self._state.active, self._state.previous):
            if content is None:
                continue
            try:
                version = _load_version(self._dir, content.slot, content.digest)
            except StalledError as error:
                self.damage.append(str(error))
                continue
            if content != self._state.active:
                self._save(replace(self._state, active=content, previous=None))
            return version
        if self._state.active is not None:
            self._save(replace(self._state, active=None, previous=None))
        return None

    def _save(self, state: _State) -> None:
        save_atomically(self._dir / "state.json", build_json(state))
        self._state = state


def _load_version(slots_dir: Path, slot: SlotName, digest: str) -> Version:
    directory = slots_dir / slot
    return Version(manifest=load_manifest(directory, digest), digest=digest, slot=slot, directory=directory)
