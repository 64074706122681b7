"""Who started a service, as systemd does: listens to what the service says of itself."""

import socket
from pathlib import Path
from types import TracebackType
from typing import Self


class NotifySocket:
    """A datagram socket at `path`; a context that closes it.

    Attributes:
        said: Every state so far, oldest first.
    """

    def __init__(self, path: Path, *, watchdog_s: float) -> None:
        self.said: list[str] = []
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def has_heard(self, state: str, times: int = 1) -> bool:
        """Return whether `state` was said that often by now."""
        try:
            while True:
                self.said.append(self._socket.recv(256).decode())
        except BlockingIOError:
            return self.said.count(state) >= times
