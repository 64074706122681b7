"""One coordinator a directory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fl_server.errors import ServerError
from models.contract.files import locking


@contextmanager
def holding_lock(path: Path) -> Iterator[None]:
    """Hold the lock at `path` while the block lasts.

    Raises:
        ServerError: Another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locking(path))
        except BlockingIOError as error:
            raise ServerError(f"a coordinator is running in {path.parent} already") from error
        yield
