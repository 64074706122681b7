"""Two places for a model version, of which one is active; a power cut at any moment leaves it whole.

    slots/a/ slots/b/     manifest.json and the files it names
    slots/state.json      which slot is active, what the other one holds, what is on trial

Only the slot that is not active is ever written, and only after `state.json` says that it holds nothing.
Changing over is the one atomic rename of `state.json`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from edge_agent.errors import StalledError
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically, sync_directory
from models.contract.manifest import MANIFEST_NAME, FileEntry, ModelManifest, parse_manifest

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
    """A staged version that has not proved itself; `tries_left` falls before each try."""

    slot: SlotName
    digest: str
    tries_left: int


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
        """Return the path in a slot of the file `name` as `entry` says, to the bit; None if no slot holds it."""
        return next((path for path in self._dir.glob(f"[ab]/{name}") if _is_file(path, entry)), None)

    def stage(self, manifest: bytes, names: Iterable[str], read: Callable[[FileEntry], Iterator[bytes]]) -> None:
        """Write a version to the idle slot and arm its trial.

        Args:
            manifest: Its bytes, verified.
            names: The files of it that this device needs.
            read: Yields the content of one that no slot has.

        Raises:
            OSError: The disk is full or broken; what was written is removed, the active version is untouched.
            StalledError: A file is not what the manifest says.
        """
        files = parse_manifest(manifest).files
        slot: SlotName = "b" if self.active is not None and self.active.slot == "a" else "a"
        if self._state.previous is not None or self._state.trial is not None:
            self._save(replace(self._state, previous=None, trial=None))
        try:
            self._fill(self._dir / slot, {name: files[name] for name in names}, read)
            save_atomically(self._dir / slot / MANIFEST_NAME, manifest)
        except BaseException:
            _clear(self._dir / slot, keep=())
            raise
        self._save(replace(self._state, trial=Trial(slot=slot, digest=build_digest(manifest), tries_left=TRIES)))

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

    def _fill(self, slot_dir: Path, files: dict[str, FileEntry], read: Callable[[FileEntry], Iterator[bytes]]) -> None:
        (slot_dir / MANIFEST_NAME).unlink(missing_ok=True)
        keep = {name for name, entry in files.items() if _is_file(slot_dir / name, entry)}
        _clear(slot_dir, keep=keep)
        for name in sorted(files.keys() - keep):
            other = self.find(files[name], name)
            _write_file(slot_dir / name, files[name], read(files[name]) if other is None else _read_file(other))
        sync_directory(slot_dir)

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
        except ContractError as error:
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
    try:
        data = (directory / MANIFEST_NAME).read_bytes()
        if build_digest(data) != digest:
            raise StalledError(f"{MANIFEST_NAME} in slot {slot} is damaged")
        manifest = parse_manifest(data)
        for name, entry in manifest.files.items():
            needed = name in manifest.serving_names or (directory / name).exists()
            if needed and not _is_file(directory / name, entry):
                raise StalledError(f"{name} in slot {slot} is damaged")
    except (OSError, ContractError) as error:
        raise StalledError(f"slot {slot} is unreadable: {error}") from error
    return Version(manifest=manifest, digest=digest, slot=slot, directory=directory)


def _is_file(path: Path, entry: FileEntry) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != entry.size_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.digest
    except FileNotFoundError:
        return False


def _read_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _write_file(path: Path, entry: FileEntry, blocks: Iterator[bytes]) -> None:
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            sha256.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if sha256.hexdigest() != entry.digest:
        raise StalledError(f"{path.name} changed while it was staged")


def _clear(slot_dir: Path, *, keep: Iterable[str]) -> None:
    kept = set(keep)
    for path in slot_dir.iterdir():
        if path.name not in kept:
            path.unlink()
