import json
import os
import resource
import signal
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import StalledError, TransientError
from edge_agent.training.accountant import Phase, compute_epsilon
from edge_agent.training.budget import BudgetError, Limits, Spend, compute_total, decide_spend
from edge_agent.training.ledger import open_ledger, parse_ledger
from models.contract.ledger import LedgerHead
from tests.simulators.crash import crash_points, power_cut, run_until_crash
from tests.simulators.step_graph import build_privacy

LIMITS = Limits(epsilon=Decimal(100), total_epsilon=Decimal(10**6), delta=Decimal("0.001"), noise_multiplier=Decimal(0))


def build_spend(number=1, *, model="digits", run="run-1", steps=2, **privacy):
    return Spend(
        order_sequence=number,
        model=model,
        run=run,
        round=number,
        privacy=build_privacy(**{"epsilon": "1000", **privacy}),
        steps=steps,
    )


def open_whole(path):
    """Open a ledger of a device that the coordinator says has never spent anything, or whose ledger is there."""
    ledger = open_ledger(path)
    ledger.restore(LedgerHead(), LIMITS.delta, at=0)
    return ledger


def spend_all(path, spends, limits=LIMITS):
    with open_whole(path) as ledger:
        return [ledger.spend(spend, limits, at=1_700_000_000) for spend in spends]


def test_entries_survive_reopening_and_say_what_was_spent(tmp_path):
    path = tmp_path / "ledger.jsonl"
    spends = [build_spend(1), build_spend(2, noise_multiplier="2"), build_spend(3, model="other")]
    written = spend_all(path, spends)
    with open_ledger(path) as ledger:
        assert ledger.entries == tuple(written)
    first, second, other = written
    assert (first.sequence, first.epsilon_before, first.delta) == (1, Decimal(0), Decimal("0.001"))
    assert second.epsilon_before == first.epsilon_after
    assert second.epsilon_after == compute_total(spends[:2], LIMITS.delta)
    assert other.epsilon_before == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_total_is_that_of_the_accountant_rounded_up():
    spends = [build_spend(number) for number in (1, 2, 3)]
    exact = compute_epsilon([Phase(0.1, 1.0, 6)], 0.001)
    total = compute_total(spends, Decimal("0.001"))
    assert Decimal(exact) <= total <= Decimal(exact) * Decimal("1.000000001")


def test_numbers_on_disk_are_integers_or_decimal_strings(tmp_path):
    path = tmp_path / "ledger.jsonl"
    spend_all(path, [build_spend(1, sampling_rate="0.064")])
    entry = json.loads(path.read_text())["entry"]
    assert entry["sampling_rate"] == "0.064"
    assert not any(isinstance(value, float) for value in entry.values())


def test_spend_up_to_the_owners_limit_is_allowed_and_beyond_it_refused_with_both_numbers():
    entries = ()
    spend = build_spend(1)
    at_limit = replace(LIMITS, epsilon=compute_total([spend], LIMITS.delta))
    assert decide_spend(entries, spend, at_limit) == (0, at_limit.epsilon)
    below = replace(LIMITS, epsilon=at_limit.epsilon - Decimal("1e-9"))
    with pytest.raises(BudgetError, match="its owner allows") as caught:
        decide_spend(entries, spend, below)
    assert (caught.value.asked, caught.value.limit) == (at_limit.epsilon, below.epsilon)


def test_noise_below_the_owners_least_is_refused():
    limits = replace(LIMITS, noise_multiplier=Decimal("0.8"))
    decide_spend((), build_spend(noise_multiplier="0.8"), limits)
    with pytest.raises(BudgetError, match="below the owner's least"):
        decide_spend((), build_spend(noise_multiplier="0.79"), limits)


def test_no_noise_is_refused_under_any_limit():
    with pytest.raises(BudgetError, match="epsilon Infinity"):
        decide_spend((), build_spend(noise_multiplier="0", epsilon="1e9"), LIMITS)


def test_run_may_not_exceed_its_own_plan_while_the_owners_limit_spans_runs(tmp_path):
    path = tmp_path / "ledger.jsonl"
    plan = str(compute_total([build_spend(1), build_spend(2)], Decimal("0.001")))
    spend_all(path, [build_spend(1, epsilon=plan), build_spend(2, epsilon=plan)])
    with open_ledger(path) as ledger:
        with pytest.raises(BudgetError, match="its plan allows"):
            ledger.spend(build_spend(3, epsilon=plan), LIMITS, at=0)
        entry = ledger.spend(build_spend(3, run="run-2", epsilon=plan), LIMITS, at=0)
        assert entry.epsilon_before == Decimal(plan)
        tight = replace(LIMITS, epsilon=entry.epsilon_after)
        with pytest.raises(BudgetError, match="its owner allows"):
            ledger.spend(build_spend(4, run="run-3", epsilon=plan), tight, at=0)
        ledger.spend(build_spend(4, model="other", epsilon=plan), tight, at=0)


def test_plan_with_a_generous_delta_does_not_widen_the_owners_limit():
    spend = build_spend(steps=200, delta="0.5")
    total = compute_total([spend], Decimal("0.001"))
    assert compute_total([spend], Decimal("0.5")) < total
    with pytest.raises(BudgetError, match="its owner allows"):
        decide_spend((), spend, replace(LIMITS, epsilon=total / 2))


def test_refused_spend_leaves_no_trace(tmp_path):
    path = tmp_path / "ledger.jsonl"
    spend_all(path, [build_spend(1)])
    before = path.read_bytes()
    with open_ledger(path) as ledger, pytest.raises(BudgetError):
        ledger.spend(build_spend(2, noise_multiplier="0.01"), LIMITS, at=0)
    assert path.read_bytes() == before


@settings(deadline=None)  # a disk takes what it takes
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(["0.01", "0.2", "1"]), st.sampled_from(["0.7", "1", "4"]), st.integers(1, 50)),
        min_size=1,
        max_size=12,
    ),
    limit=st.decimals("0.1", "50", places=3),
)
def test_whatever_is_asked_the_total_never_crosses_the_limit(tmp_path_factory, kinds, limit):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    limits = replace(LIMITS, epsilon=limit)
    allowed = []
    with open_whole(path) as ledger:
        for number, (rate, noise, steps) in enumerate(kinds, start=1):
            spend = build_spend(number, sampling_rate=rate, noise_multiplier=noise, steps=steps)
            total = compute_total([*allowed, spend], limits.delta)
            if total > limit:
                with pytest.raises(BudgetError) as caught:
                    ledger.spend(spend, limits, at=number)
                assert (caught.value.asked, caught.value.limit) == (total, limit)
            else:
                assert ledger.spend(spend, limits, at=number).epsilon_after == total
                allowed.append(spend)
    truth = compute_epsilon([spend.phase for spend in allowed], 0.001)
    with open_ledger(path) as ledger:
        assert compute_total(ledger.entries, limits.delta) >= Decimal(truth)


@pytest.fixture(scope="module")
def ledger_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    spend_all(path, [build_spend(number) for number in (1, 2, 3)])
    return path.read_bytes()


@settings(deadline=None)  # a disk takes what it takes
@given(data=st.data())
def test_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, ledger_bytes, data):
    cut = ledger_bytes[: data.draw(st.integers(0, len(ledger_bytes)))]
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    path.write_bytes(cut)
    with open_whole(path) as ledger:
        assert len(ledger.entries) == cut.count(b"\n")
        ledger.spend(build_spend(9), LIMITS, at=0)
    with open_ledger(path) as ledger:
        assert len(ledger.entries) == cut.count(b"\n") + 1


@settings(deadline=None)  # a disk takes what it takes
@given(data=st.data())
def test_any_altered_byte_of_a_promised_line_stops_training(ledger_bytes, data):
    index = data.draw(st.integers(0, len(ledger_bytes) - 2))  # all but the last newline, which makes it a promise
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != ledger_bytes[index]))
    with pytest.raises(StalledError, match="line"):
        parse_ledger(ledger_bytes[:index] + bytes([byte]) + ledger_bytes[index + 1 :])


@pytest.mark.parametrize("change", ["remove", "swap", "repeat"])
def test_lines_removed_swapped_or_repeated_stop_training(tmp_path, ledger_bytes, change):
    first, second, third = ledger_bytes.splitlines(keepends=True)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes({"remove": first + third, "swap": second + first + third, "repeat": first * 2 + second}[change])
    with pytest.raises(StalledError, match=r"ledger\.jsonl: line"):
        open_ledger(path)
    with pytest.raises(StalledError, match="line"):  # neither mended nor left locked
        open_ledger(path)


def test_ledger_is_open_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with open_whole(path) as ledger:
        with pytest.raises(TransientError, match="another training process"):
            open_ledger(path)
        ledger.spend(build_spend(1), LIMITS, at=0)
    open_ledger(path).close()


def test_full_disk_refuses_the_spend_and_all_after_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    spend_all(path, [build_spend(1)])
    size = path.stat().st_size

    def spend_on_a_full_disk(_tell):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open_ledger(path) as ledger:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))  # ten bytes are left
            for number in (2, 3):
                with pytest.raises(StalledError, match="ledger"):
                    ledger.spend(build_spend(number), LIMITS, at=0)

    assert not run_until_crash(spend_on_a_full_disk, crash_at=None).crashed
    assert path.stat().st_size == size + 10
    with open_ledger(path) as ledger:
        assert len(ledger.entries) == 1


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
def test_at_every_crash_point_the_ledger_holds_at_least_what_left(tmp_path, power):
    spends = [build_spend(number) for number in (1, 2, 3)]

    def work(path):
        def spend_and_send(tell):
            with open_whole(path) as ledger:
                for spend in spends:
                    ledger.spend(spend, LIMITS, at=0)
                    tell(str(spend.round))

        return spend_and_send

    points = 0
    for crash_at in crash_points():
        path = tmp_path / f"{crash_at}.jsonl"
        outcome = run_until_crash(work(path), crash_at=crash_at)
        if power:
            power_cut(path, outcome)
        left = [spend for spend in spends if str(spend.round) in outcome.told]
        with open_ledger(path) as ledger:
            assert compute_total(ledger.entries, LIMITS.delta) >= compute_total(left, LIMITS.delta)
        points += 1
        if not outcome.crashed:
            assert len(left) == 3
            break
    assert points > 15  # three writes in halves, three syncs, and those of opening


def test_without_the_sync_a_power_cut_would_be_noticed(tmp_path):
    path = tmp_path / "ledger.jsonl"

    def spend_without_sync(tell):
        with open_whole(path) as ledger:
            os.fsync = lambda _descriptor: None
            ledger.spend(build_spend(1), LIMITS, at=0)
            tell("1")

    power_cut(path, run_until_crash(spend_without_sync, crash_at=None))
    with open_ledger(path) as ledger:
        assert not ledger.entries
