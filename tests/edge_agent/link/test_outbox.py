"""Events wait on disk until they are acknowledged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edge_agent.link.outbox as outbox_module
from edge_agent.errors import StalledError
from edge_agent.link.outbox import open_outbox

REPOSITORY = Path(__file__).parents[3]


def test_events_come_in_order_until_they_are_removed(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path / "outbox.db")
    for number in range(4):
        outbox.put(f"id-{number}", b"%d" % number)
    outbox.remove(["id-1", "unknown"])
    assert outbox.load_pending() == [b"0", b"2", b"3"]
    assert outbox.load_pending(2) == [b"0", b"2"]
    assert (outbox.count(), outbox.dropped) == (3, 0)
    outbox.close()


def test_full_outbox_drops_the_oldest_and_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "EVENTS_MAX", 3)
    outbox = open_outbox(tmp_path / "outbox.db")
    for number in range(5):
        outbox.put(f"id-{number}", b"%d" % number)
    assert outbox.load_pending() == [b"2", b"3", b"4"]
    assert outbox.dropped == 2
    outbox.close()


def test_file_that_is_no_outbox_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").write_bytes(b"x" * 5000)
    with pytest.raises(StalledError, match=r"outbox\.db"):
        open_outbox(tmp_path / "outbox.db")


def test_hundred_events_of_a_killed_process_are_all_there(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edge_agent.link.outbox import open_outbox\n"
        "outbox = open_outbox(Path(sys.argv[1]))\n"
        "for number in range(100): outbox.put(str(number), b'%d' % number)\n"
        "print('kept', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "outbox.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"kept\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    outbox = open_outbox(tmp_path / "outbox.db")
    assert outbox.load_pending() == [b"%d" % number for number in range(100)]
    outbox.close()
