"""What was said waits on disk until it has arrived, and what must give way is counted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.errors import StalledError
from edge_agent.link.outbox import Bounds, Item, Kind, Outbox, open_outbox

REPOSITORY = Path(__file__).parents[3]
NOW_S = 1e9
BOUNDS = Bounds(max_bytes=1000, telemetry_max_age_s=100)


def open_it(tmp_path: Path, bounds: Bounds = BOUNDS) -> Outbox:
    return open_outbox(tmp_path / "outbox.db", bounds)


def build(name: str, kind: Kind = Kind.EVENT, *, said_s: float = NOW_S, size: int = 100) -> Item:
    return Item(id=name, kind=kind, said_s=said_s, payload=name.encode().ljust(size, b"."))


def names(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def test_items_come_in_order_until_they_are_removed(tmp_path: Path) -> None:
    outbox = open_it(tmp_path)
    assert outbox.put([build("0"), build("1", Kind.TELEMETRY), build("2")], now_s=NOW_S)
    assert outbox.put([build("3"), build("0")], now_s=NOW_S)  # an id that is here stands for what it names
    outbox.remove(["2", "unknown"])
    first, *others = outbox.load()
    assert (first.payload, first.kind, first.said_s) == (build("0").payload, Kind.EVENT, NOW_S)
    assert names(others) == ["1", "3"]
    assert names(outbox.load(after=first.position, limit=1)) == ["1"]
    assert names(outbox.load_events(up_to=others[0].position, limit=9)) == ["0"]
    assert (outbox.events, outbox.dropped) == (2, 0)
    outbox.close()


def test_full_outbox_drops_the_oldest_telemetry_then_the_oldest_events_and_counts_for_ever(tmp_path: Path) -> None:
    outbox = open_it(tmp_path)
    for number in range(6):
        outbox.put([build(f"t{number}", Kind.TELEMETRY), build(f"e{number}")], now_s=NOW_S)
    assert names(outbox.load()) == ["e0", "e1", "t2", "e2", "t3", "e3", "t4", "e4", "t5", "e5"]
    outbox.put([build(f"more{number}") for number in range(5)], now_s=NOW_S)
    assert names(outbox.load()) == [f"e{number}" for number in range(1, 6)] + [f"more{number}" for number in range(5)]
    assert outbox.dropped == 7
    outbox.close()
    outbox = open_it(tmp_path)
    assert (outbox.dropped, outbox.events) == (7, 10)
    outbox.close()


def test_telemetry_that_is_too_old_goes_and_events_stay(tmp_path: Path) -> None:
    outbox = open_it(tmp_path)
    old = NOW_S - 101
    outbox.put([build("t", Kind.TELEMETRY, said_s=old), build("e", said_s=old)], now_s=old)
    outbox.put([build("new", Kind.TELEMETRY)], now_s=NOW_S)
    assert names(outbox.load()) == ["e", "new"]
    assert outbox.dropped == 1
    outbox.close()


def test_disk_that_takes_nothing_is_said_and_counted_and_what_was_there_stays(tmp_path: Path) -> None:
    outbox = open_it(tmp_path)
    outbox.put([build("kept")], now_s=NOW_S)
    pages = outbox._connection.execute("PRAGMA page_count").fetchone()[0]
    outbox._connection.execute(f"PRAGMA max_page_count = {pages}")
    big = build("big", size=900_000)
    assert not outbox.put([big, build("small")], now_s=NOW_S)
    assert (names(outbox.load()), outbox.dropped, outbox.events) == (["kept"], 2, 1)
    outbox.remove(["kept"])
    assert outbox.events == 0
    outbox.close()


def test_file_that_is_no_outbox_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").write_bytes(b"x" * 5000)
    with pytest.raises(StalledError, match=r"outbox\.db"):
        open_it(tmp_path)


def test_hundred_items_of_a_killed_process_are_all_there(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.edge_agent.link.test_outbox import *\n"
        "outbox = open_it(Path(sys.argv[1]), Bounds(max_bytes=10**6, telemetry_max_age_s=9))\n"
        "for number in range(100): outbox.put([build(str(number))], now_s=NOW_S)\n"
        "print('kept', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"kept\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    outbox = open_it(tmp_path)
    assert names(outbox.load()) == [str(number) for number in range(100)]
    outbox.close()
