"""The device's secrets: a file nobody else can read, or a command that yields them within bounds."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from edge_agent.errors import StalledError
from edge_agent.samples.keys import MissingKeyError, fetch_key, load_key
from tests.simulators.waiting import wait_until


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_key_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    load_key(tmp_path / "samples.key")
    (tmp_path / "samples.key").chmod(mode)
    with pytest.raises(StalledError, match=f"mode 0{mode:o}.*expected 0600"):
        load_key(tmp_path / "samples.key")


def test_key_that_was_lost_is_not_replaced_where_something_was_sealed_with_it(tmp_path: Path) -> None:
    with pytest.raises(MissingKeyError, match=r"samples\.key is missing"):
        load_key(tmp_path / "samples.key", may_make=False)
    assert not list(tmp_path.iterdir())


def test_command_yields_the_key_in_hex_or_as_it_is() -> None:
    key = bytes(range(32))
    assert fetch_key(python(f"print('{key.hex()}')")) == key
    assert fetch_key(python(f"import sys; sys.stdout.buffer.write(bytes.fromhex('{key.hex()}'))")) == key


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('5ec2e7' * 4)", "25 bytes that are no key"),
        ("print('5ec2e7' * 10 + 'zzzz')", "that are no key"),
        ("print('5ec2e7' * 4); raise SystemExit(3)", "exit code 3"),
        ("import sys\nwhile True: sys.stdout.write('5ec2e7' * 1000)", "more than 256 bytes"),
    ],
)
def test_command_that_yields_none_is_refused_and_its_output_not_repeated(code: str, said: str) -> None:
    with pytest.raises(StalledError, match=said) as refused:
        fetch_key(python(code))
    assert "5ec2e7" not in str(refused.value)


def test_command_that_never_ends_is_ended_with_what_it_started(tmp_path: Path) -> None:
    pid_path = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"pathlib.Path({str(pid_path)!r}).write_text(str(p.pid)); p.wait()"
    )
    with pytest.raises(StalledError, match="longer than 1 s"):
        fetch_key(python(code), timeout_s=1)
    if pid_path.exists():
        path = Path(f"/proc/{pid_path.read_text()}/stat")
        wait_until(
            lambda: not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z",
            "the child to have ended",
        )
    with pytest.raises(StalledError, match="cannot be run"):
        fetch_key("/no/such/program")


def test_daemon_that_the_command_leaves_with_its_output_holds_nobody_up(tmp_path: Path) -> None:
    pid_path = tmp_path / "pid"
    script = f"setsid sleep 8 & echo $! > {shlex.quote(str(pid_path))}; echo {'00' * 32}"
    with pytest.raises(StalledError, match="longer than 1 s"):
        fetch_key(shlex.join(["sh", "-c", script]), timeout_s=1)
    pid = int(pid_path.read_text())
    assert " (sleep) S " in Path(f"/proc/{pid}/stat").read_text()
    os.kill(pid, signal.SIGKILL)
