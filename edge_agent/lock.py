"""One agent a state directory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from models.contract.files import locking
from models.contract.settings import SettingsError

LOCK_NAME = ".lock"


@contextmanager
def holding_lock(state_dir: Path) -> Iterator[None]:
    """Hold `state_dir`, which exists, while the block lasts.

    Raises:
        SettingsError: Another agent holds it, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locking(state_dir / LOCK_NAME))
        except BlockingIOError as error:
            raise SettingsError(f"state_dir: another agent is running in {state_dir}") from error
        except OSError as error:
            raise SettingsError(f"{error.filename}: {error.strerror}") from error
        yield
