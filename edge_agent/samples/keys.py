"""Secrets of the device that never leave it: a file that its owner alone can read, or a command that yields one."""

import os
import select
import shlex
import signal
import subprocess
import time
from pathlib import Path

from edge_agent.errors import StalledError
from models.contract.files import save_atomically

KEY_BYTES = 32
COMMAND_TIMEOUT_S = 10.0  # a TPM takes about one
_OUTPUT_MAX_BYTES = 256  # 64 hex digits and some white space


class MissingKeyError(StalledError):
    """There is no key where there should be one."""


def load_key(path: Path, *, may_make: bool = True) -> bytes:
    """Return the secret at `path`, readable by its owner only.

    Args:
        path: Its file.
        may_make: Whether it is made if there is none: not where something was made with it already.

    Raises:
        MissingKeyError: There is none, and none may be made.
        StalledError: Unreadable, damaged, or readable by others: another key would not do what this one does.
    """
    try:
        if not path.exists():
            if not may_make:
                raise MissingKeyError(f"{path} is missing")
            save_atomically(path, os.urandom(KEY_BYTES), mode=0o600)
        mode = path.stat().st_mode & 0o777
        key = path.read_bytes()
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror or error}") from error
    if len(key) != KEY_BYTES:
        raise StalledError(f"{path}: {len(key)} bytes, expected a key of {KEY_BYTES}")
    if mode & 0o077:
        raise StalledError(f"{path} has mode {mode:04o}: others may have read it, expected 0600")
    return key


def fetch_key(command: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> bytes:
    """Return the key that `command` prints, as 64 hex digits or 32 bytes; nothing of its output is ever repeated.

    Raises:
        StalledError: It failed, took longer than `timeout_s`, or printed something else.
    """
    try:
        child = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what it starts ends with it
        )
    except (OSError, ValueError) as error:
        raise StalledError(f"samples.key_command cannot be run: {error}") from error
    ends_s = time.monotonic() + timeout_s
    with child:
        assert child.stdout is not None
        try:
            printed = _read_output(child.stdout.fileno(), ends_s)
            code = child.wait(max(0.0, ends_s - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise StalledError(f"samples.key_command took longer than {timeout_s:g} s") from error
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
    return _parse_key(printed, code)


def _read_output(descriptor: int, ends_s: float) -> bytes:
    """Return all that comes; raises TimeoutError, also where a daemon that was left behind keeps the pipe open."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    printed = b""
    while poll.poll(1000 * max(0.0, ends_s - time.monotonic())):
        part = os.read(descriptor, _OUTPUT_MAX_BYTES + 1)
        if not part:
            return printed
        printed += part
        if len(printed) > _OUTPUT_MAX_BYTES:
            raise StalledError(
                f"samples.key_command printed more than {_OUTPUT_MAX_BYTES} bytes, expected 64 hex digits"
            )
    raise TimeoutError


def _parse_key(printed: bytes, code: int) -> bytes:
    if code:
        raise StalledError(f"samples.key_command ended with exit code {code}")
    if len(printed) == KEY_BYTES:
        return printed
    try:
        key = bytes.fromhex(printed.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise StalledError(f"samples.key_command printed {len(printed)} bytes that are no key, expected 64 hex digits")
    return key
