"""A child may crash, fill the memory or never end; its parent gets one line."""

import os
from pathlib import Path

import pytest

from edge_agent.children import DeadlineError, run_child
from edge_agent.errors import StalledError

COPIES = """
import os, signal
from edge_agent.children import Copy
from edge_agent.errors import AgentError

def explain():
    print("one reason")
    return 1

def never_end():
    while True:
        pass

print("begin")
for work in (int, explain, lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda: 1 // 0, never_end):
    copy = Copy(work, deadline_s=2)
    try:
        copy.wait()
        print("done")
    except AgentError as error:
        print(error)
    finally:
        copy.close()
try:
    os.wait()
except ChildProcessError:
    print("none left")
"""
BOUND = "from edge_agent.children import bound_this_process as bound\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "probe.py").write_text(source)
        return "probe"

    return write


def test_child_gets_its_input_and_gives_its_output(module) -> None:
    name = module("import sys\nprint(sys.argv[1] + sys.stdin.read())")
    assert run_child(name, "a", given=b"b", deadline_s=20) == b"ab\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys\nprint('one reason')\nsys.exit(1)", "^one reason$"),
        ("import sys\nsys.exit(3)", "exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
        (BOUND + "bound(memory_bytes=1 << 29, cpu_s=20, writes=True)\nbytes(1 << 33)", "exit code 1"),
        (BOUND + "bound(memory_bytes=1 << 29, cpu_s=1, writes=True)\nwhile True: pass", "ended by SIG(XCPU|KILL)"),
        (
            BOUND
            + "bound(memory_bytes=1 << 29, cpu_s=20, writes=False)\n__import__('pathlib').Path('x').write_text('x')",
            "exit code 1",
        ),
    ],
    ids=["reason", "silence", "signal", "crash", "memory", "processor", "file"],
)
def test_how_a_child_failed_is_said(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StalledError, match=said):
        run_child(module(source), deadline_s=30)
    assert not any(path.stat().st_size for path in tmp_path.glob("x"))


def test_child_that_never_ends_is_ended(module, tmp_path: Path) -> None:
    name = module(
        f"import os, pathlib\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\nwhile True: pass"
    )
    with pytest.raises(DeadlineError, match="not done within 2 s"):
        run_child(name, deadline_s=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_how_a_copy_of_a_process_failed_is_said_and_none_is_left(module) -> None:
    assert run_child(module(COPIES), deadline_s=30).decode().splitlines() == [
        "begin",
        "done",
        "one reason",
        "the process it was tried in was ended by SIGSEGV",
        "the process it was tried in ended with exit code 1",
        "not done within 2 s",
        "none left",
    ]
