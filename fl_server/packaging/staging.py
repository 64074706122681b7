"""A folder that appears whole and durable, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.contract.encoding import build_digest
from models.contract.files import sync_directory
from models.contract.manifest import FileEntry


@contextlib.contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends without an error.

    A kill leaves at most a hidden folder `.NAME~*` there, which the next attempt clears.
    """
    for abandoned in path.parent.glob(f".{path.name}~*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}~", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp keeps others out; what is finished is for all to read
        for file in staging.iterdir():
            _sync_file(file)
        sync_directory(staging)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_directory(path.parent)


def describe_file(path: Path) -> FileEntry:
    """Return digest and size of the file at `path`."""
    data = path.read_bytes()
    return FileEntry(digest=build_digest(data), size_bytes=len(data))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
