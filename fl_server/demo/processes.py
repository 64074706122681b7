"""Child processes of the demo: started with a log file, watched, ended by pid."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fl_server.errors import ServerError

STOP_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Child:
    """One running program; it dies with this process, even when this one is killed."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=cwd,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads are running when children start
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops its children in order
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_alive(self) -> None:
        """Raise ServerError with the last line of its log if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"{self.name} ended with code {code}: {self._last_line()} (log: {self.log_path})")

    def stop(self) -> None:
        """Ask it to end, then end it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()

    def _last_line(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def run_command(name: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
    """Run one of this project's commands to its end and return what it printed.

    Raises:
        ServerError: It failed; the message is the line it gave.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServerError(f"{name}: {(done.stderr or done.stdout).strip().splitlines()[-1:] or 'failed'}")
    return done.stdout


def find_free_ports(count: int) -> list[int]:
    """Return `count` different TCP ports that are free on 127.0.0.1 now."""
    doors = [socket.socket() for _ in range(count)]
    try:
        for door in doors:
            door.bind(("127.0.0.1", 0))
        return [door.getsockname()[1] for door in doors]
    finally:
        for door in doors:
            door.close()


def find_mosquitto() -> str:
    """Return the path of a mosquitto; raises ServerError that says how to get one."""
    return _find_program("mosquitto", "deploy/broker/get-mosquitto.sh")


def find_nginx() -> str:
    """Return the path of an nginx; raises ServerError that says how to get one."""
    return _find_program("nginx", "deploy/server/get-nginx.sh")


def _find_program(name: str, script: str) -> str:
    unpacked = Path(sys.prefix) / name / name
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path) or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        raise ServerError(f"there is no {name}: run `{script} {unpacked.parent}` or install it")
    return found


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
