"""A ledger that was lost comes back from the coordinator's copy, through kills, wipes and old backups."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.training.budget import Limits, Spend, compute_total, count_spent
from edge_agent.training.ledger import NoCopyError, open_ledger
from fl_server.fleet.roster import Roster
from models.contract.ledger import LedgerHead, Spent, take_larger
from tests.simulators.crash import crash_points, run_until_crash
from tests.simulators.step_graph import build_privacy

DELTA = Decimal("0.001")
LIMITS = Limits(epsilon=Decimal(10**6), total_epsilon=Decimal(10**6), delta=DELTA, noise_multiplier=Decimal(0))
COPY = LedgerHead(
    entries=7,
    digest="d" * 64,
    spent=(
        Spent(model="m", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(1), steps=40),
        Spent(model="m", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(2), steps=30),
        Spent(model="other", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal(2), steps=5),
    ),
)


def build_spend(number: int, noise: str = "1") -> Spend:
    privacy = build_privacy(epsilon="1000", noise_multiplier=noise)
    return Spend(order_sequence=number, model="m", run="run-1", round=number, privacy=privacy, steps=10)


def test_absent_ledger_charges_nothing_without_a_copy_and_whatever_a_copy_says_with_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):  # the file that the first left is no ledger yet
        with open_ledger(path) as ledger:
            with pytest.raises(NoCopyError, match="after a reinstall it trains only with the coordinator's copy"):
                ledger.restore(None, DELTA, at=0)
            with pytest.raises(NoCopyError):
                ledger.spend(build_spend(1), LIMITS, at=0)
    assert path.read_bytes() == b""
    with open_ledger(path) as ledger:
        assert ledger.restore(COPY, DELTA, at=5) == 3
        entry = ledger.spend(build_spend(1), LIMITS, at=6)
    with open_ledger(path) as ledger:
        assert ledger.entries[-1] == entry
        assert count_spent(ledger.entries[:-1]) == COPY.spent
        assert [(found.restored_from, found.restored_left) for found in ledger.entries] == [
            ("d" * 64, 2),
            ("d" * 64, 1),
            ("d" * 64, 0),
            (None, 0),
        ]
        before = [found for found in ledger.entries[:-1] if found.model == "m"]
        assert entry.epsilon_before == compute_total(before, DELTA) > 0
        assert ledger.restore(None, DELTA, at=7) == ledger.restore(COPY, DELTA, at=7) == 0


def test_larger_spend_wins_whichever_side_has_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        ledger.restore(LedgerHead(), DELTA, at=0)
        for number in range(1, 8):
            ledger.spend(build_spend(number), LIMITS, at=0)
        own = ledger.head
        assert own.spent[0].steps == 70
        assert ledger.restore(COPY, DELTA, at=0) == 2  # its own 70 steps are more than the copy's 40
        assert ledger.head.spent == take_larger(own.spent, COPY.spent)
        older = replace(COPY, spent=COPY.spent[:1])
        assert ledger.restore(older, DELTA, at=0) == 0


def test_copy_that_was_taken_in_part_when_the_process_was_killed_is_no_ledger_yet(tmp_path: Path) -> None:
    for crash_at in crash_points():
        path = tmp_path / f"{crash_at}.jsonl"
        outcome = run_until_crash(lambda _tell, path=path: restore(path, COPY), crash_at=crash_at)
        with open_ledger(path) as ledger:
            try:
                ledger.spend(build_spend(1), LIMITS, at=0)
            except NoCopyError:
                ledger.restore(COPY, DELTA, at=0)
            assert take_larger(ledger.head.spent, COPY.spent) == ledger.head.spent
        if not outcome.crashed:
            break
    assert crash_at > 12  # three writes in halves, three syncs


def restore(path: Path, copy: LedgerHead) -> None:
    with open_ledger(path) as ledger:
        ledger.restore(copy, DELTA, at=0)


ROUNDS = st.fixed_dictionaries(
    {
        "noise": st.sampled_from(["1", "2", "3"]),
        "crash_at": st.none() | st.integers(0, 16),
        "has_copy": st.booleans(),
        "is_seen": st.booleans(),  # by the coordinator, as an update that came
        "is_late": st.booleans(),  # what the device says waits for the broker
    }
)
UNSEEN = {"noise": "1", "crash_at": None, "has_copy": True, "is_seen": False, "is_late": True}


@settings(deadline=None, max_examples=40)  # a disk takes what it takes
@given(
    events=st.lists(
        ROUNDS | st.sampled_from(["wipe", "broker is back", "backup", "restore backup"]), min_size=2, max_size=10
    )
)
@example(events=[UNSEEN, UNSEEN | {"is_seen": True}, "wipe"])
def test_whatever_happens_no_update_leaves_that_the_ledger_does_not_hold(
    tmp_path_factory: pytest.TempPathFactory, events: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("device") / "ledger.jsonl"
    backup, left, number = b"", list[Spend](), 0
    with Roster(path.with_name("coordinator.db")) as roster:
        seen, reports = set[int](), dict[int, LedgerHead]()
        for event in events:
            if event in ("wipe", "restore backup"):
                # Nobody remembers an update that was not seen, of which the device could not tell before.
                deliver(roster, {waiting: head for waiting, head in reports.items() if waiting not in seen})
            if event == "wipe":
                path.unlink(missing_ok=True)
                reports.clear()
            elif event == "broker is back":
                deliver(roster, reports)
                reports.clear()
            elif event == "backup":
                backup = path.read_bytes() if path.exists() else b""
            elif event == "restore backup":
                path.write_bytes(backup)
            else:
                number += 1
                spend = build_spend(number, event["noise"])
                # Who has a ledger trains without a copy; one put back from a backup nothing tells from a true one.
                copy = roster.get_ledger("d") if event["has_copy"] or "restore backup" in events else None
                if train(path, spend, copy, event["crash_at"]):
                    left.append(spend)
                    with open_ledger(path) as ledger:
                        assert covers(ledger.entries, left)
                        reports[number] = ledger.head
                    if event["is_seen"]:
                        seen.add(number)
                        roster.save_update("d", spend.run, number, count_spend(spend))
                    if not event["is_late"]:
                        deliver(roster, {number: reports.pop(number)})
        deliver(roster, reports)
        with open_ledger(path) as ledger:
            ledger.restore(roster.get_ledger("d"), DELTA, at=0)
            assert covers(ledger.entries, left)


def covers(entries: Any, left: list[Spend]) -> bool:
    return compute_total(entries, DELTA) >= compute_total(left, DELTA)


def deliver(roster: Roster, reports: dict[int, LedgerHead]) -> None:
    for number, head in reversed(reports.items()):  # in the worst order
        roster.save_ledger("d", head, run="run-1", round_number=number)


def train(path: Path, spend: Spend, copy: LedgerHead | None, crash_at: int | None) -> bool:
    """Return whether the round's update left, from a process that may be killed at any write or sync."""

    def work(tell: Any) -> None:
        with open_ledger(path) as ledger:
            try:
                ledger.restore(copy, DELTA, at=0)
                ledger.spend(spend, LIMITS, at=0)
            except NoCopyError:
                return
            tell("left")

    return bool(run_until_crash(work, crash_at=crash_at).told)


def count_spend(spend: Spend) -> Spent:
    return Spent(
        model=spend.model,
        sampling_rate=spend.privacy.sampling_rate,
        noise_multiplier=spend.privacy.noise_multiplier,
        steps=spend.steps,
    )
