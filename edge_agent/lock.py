"""One agent a state directory: a lock that the kernel gives back however its holder ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.contract.settings import SettingsError

LOCK_NAME = ".lock"


@contextmanager
def holding_lock(state_dir: Path) -> Iterator[None]:
    """Hold `state_dir`, which exists, while the block lasts.

    Raises:
        SettingsError: Another agent holds it, or it cannot be written.
    """
    try:
        descriptor = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(f"state_dir: another agent is running in {state_dir}") from error
        yield
    finally:
        os.close(descriptor)
