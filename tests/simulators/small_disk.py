"""A disk of a few megabytes that a test may fill to the last byte."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_disk(directory: Path, *, size_mb: int) -> Iterator[Path]:
    """Yield a tmpfs in `directory`; skips the test where it may not be mounted."""
    disk = directory / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(disk)]
    if subprocess.run(mounting, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_disk(disk: Path) -> None:
    """Leave no free byte; by single writes, since a buffer would try again when it is closed."""
    descriptor = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
    while True:
        try:
            os.write(descriptor, bytes(65_536))
        except OSError:
            break
    os.close(descriptor)
    assert os.statvfs(disk).f_bavail == 0
