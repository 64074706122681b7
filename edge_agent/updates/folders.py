"""The folder of a slot: how the files of a version get there, synced, and whether they are still what they were.

slots/a/ slots/b/ slots/c/     manifest.json and the files it names; who writes one has said first that it is empty
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edge_agent.errors import StalledError, TransientError
from models.contract.encoding import build_digest
from models.contract.errors import ContractError
from models.contract.files import save_atomically, sync_directory
from models.contract.manifest import MANIFEST_NAME, FileEntry, ModelManifest, parse_manifest


def fill_slot(
    slot_dir: Path, manifest: bytes, names: Iterable[str], read: Callable[[FileEntry], Iterator[bytes]]
) -> None:
    """Replace what `slot_dir` holds by a version, taking what any slot beside it has of its files.

    Args:
        slot_dir: Nobody believes in what it holds.
        manifest: Its bytes, verified.
        names: The files of it that this device needs.
        read: Yields the content of one that no slot has.

    Raises:
        OSError: The disk is full or broken; what was written is removed.
        TransientError: A file is not what the manifest says.
    """
    entries = parse_manifest(manifest).all_files
    files = {name: entries[name] for name in names}
    try:
        (slot_dir / MANIFEST_NAME).unlink(missing_ok=True)
        keep = {name for name, entry in files.items() if _is_file(slot_dir / name, entry)}
        clear_slot(slot_dir, keep=keep)
        for name in sorted(files.keys() - keep):
            other = find_file(slot_dir.parent, files[name], name)
            _write_file(slot_dir / name, files[name], read(files[name]) if other is None else _read_file(other))
        sync_directory(slot_dir)
        save_atomically(slot_dir / MANIFEST_NAME, manifest)
    except BaseException:
        clear_slot(slot_dir)
        raise


def find_file(slots_dir: Path, entry: FileEntry, name: str) -> Path | None:
    """Return where a slot holds the file `name` as `entry` says, to the bit."""
    return next((path for path in slots_dir.glob(f"[abc]/{name}") if _is_file(path, entry)), None)


def load_manifest(slot_dir: Path, digest: str) -> ModelManifest:
    """Return the manifest of this `digest` in a slot, whose files are whole; raises StalledError."""
    try:
        data = (slot_dir / MANIFEST_NAME).read_bytes()
        if build_digest(data) != digest:
            raise StalledError(f"{MANIFEST_NAME} in slot {slot_dir.name} is damaged")
        manifest = parse_manifest(data)
        for name, entry in manifest.all_files.items():
            needed = name in manifest.serving_names or (slot_dir / name).exists()
            if needed and not _is_file(slot_dir / name, entry):
                raise StalledError(f"{name} in slot {slot_dir.name} is damaged")
    except (OSError, ContractError) as error:
        raise StalledError(f"slot {slot_dir.name} is unreadable: {error}") from error
    return manifest


def clear_slot(slot_dir: Path, *, keep: Iterable[str] = ()) -> None:
    """Remove what a slot holds, but for the files `keep`."""
    kept = set(keep)
    for path in slot_dir.iterdir():
        if path.name not in kept:
            path.unlink()


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
        raise TransientError(f"{path.name} changed while it was staged")
