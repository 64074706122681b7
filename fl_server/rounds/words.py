"""What the coordinator says to a driver, a line each; the end of the stream means stop.

continue             the next round may begin
gone DEVICE ROUND    it will not reply any more, as far as is known
stop
"""

import threading
from queue import Empty, SimpleQueue
from typing import Protocol, TextIO

from fl_server.errors import RunError


class StoppedError(RunError):
    """The coordinator said stop, or is gone; the run goes on when its driver is started again."""


class Permits(Protocol):
    """Says when the run goes on, and without whom, as `Words` of the coordinator do."""

    def wait_for_permit(self) -> None: ...
    def pause(self, seconds: float) -> None: ...
    def take_gone(self) -> list[tuple[str, int]]: ...


class Words:
    """Reads them from `stream` on a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._permits, self._stopped = threading.Semaphore(0), threading.Event()
        self._gone = SimpleQueue[tuple[str, int]]()
        threading.Thread(target=self._listen, args=(stream,), daemon=True).start()

    def wait_for_permit(self) -> None:
        """Return at the next "continue"; raises StoppedError."""
        self._permits.acquire()
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Return after `seconds`; raises StoppedError as soon as it is said."""
        if self._stopped.wait(seconds):
            raise StoppedError("stopped")

    def take_gone(self) -> list[tuple[str, int]]:
        """Return the devices and rounds that were named since the last call."""
        taken: list[tuple[str, int]] = []
        while True:
            try:
                taken.append(self._gone.get_nowait())
            except Empty:
                return taken

    def _listen(self, stream: TextIO) -> None:
        for line in stream:
            match line.split():
                case ["continue"]:
                    self._permits.release()
                case ["gone", device_id, number]:
                    self._gone.put((device_id, int(number)))
                case ["stop"]:
                    break
        self._stopped.set()
        self._permits.release()


def build_gone(device_id: str, number: int) -> bytes:
    """Return the line that says that a device is gone from round `number`."""
    return f"gone {device_id} {number}\n".encode()
