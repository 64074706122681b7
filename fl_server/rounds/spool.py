"""The updates of the round under way, each on disk once, so that a killed coordinator loses none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.contract.files import save_atomically, sync_directory
from models.contract.topics import check_name
from models.tensors.layout import Vector, build_vector_bytes

Matrix: TypeAlias = npt.NDArray[np.float32]

UPDATES_NAME = "updates"  # of the folder, in a round's
_SUFFIX = ".f32"


def list_spooled(directory: Path) -> set[str]:
    """Return whose updates are in `directory`, which another process may be changing."""
    return {path.name.removesuffix(_SUFFIX) for path in directory.glob(f"[!.]*{_SUFFIX}")}


def discard_updates(run_dir: Path) -> None:
    """Empty what is spooled in a run that will not go on; whose it was stays known, since it was paid for."""
    for path in run_dir.glob(f"rounds/[0-9]*/{UPDATES_NAME}/*{_SUFFIX}"):
        os.truncate(path, 0)


class Spool:
    """One round's updates in `directory`: raw little-endian float32, one file a device."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory, self._size = directory, size
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)
        self.devices = {path.name.removesuffix(_SUFFIX) for path in self._list_whole()}

    def add(self, device_id: str, update: Vector) -> bool:
        """Store one update durably; return False, and store nothing, for a device that has one already."""
        if device_id in self.devices:
            return False
        save_atomically(self._directory / f"{check_name(device_id, 'device id')}{_SUFFIX}", build_vector_bytes(update))
        self.devices.add(device_id)
        return True

    def read(self) -> Iterator[Vector]:
        """Yield the stored updates, shape (size,), one in memory at a time."""
        for path in self._list_whole():
            yield np.frombuffer(path.read_bytes(), "<f4").astype(np.float32)

    def read_columns(self, start: int, stop: int) -> Matrix:
        """Return these columns of all updates, shape (devices, stop - start), in the same order each time.

        They are read, not mapped: a page of a mapped file counts as this process's memory until it is mapped away.
        """
        paths = self._list_whole()
        columns = np.empty((len(paths), stop - start), np.float32)
        for row, path in zip(columns, paths, strict=True):
            row[:] = np.fromfile(path, "<f4", count=stop - start, offset=4 * start)
        return columns

    def clear(self) -> None:
        """Remove the updates: they are in the mean, and nobody else is to have them."""
        for path in self._directory.iterdir():
            path.unlink()
        self._directory.rmdir()
        self.devices.clear()

    def _list_whole(self) -> list[Path]:
        paths = sorted(self._directory.glob(f"[!.]*{_SUFFIX}"))
        return [path for path in paths if path.stat().st_size == 4 * self._size]
