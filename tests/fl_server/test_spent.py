"""What devices must have spent follows from the runs on disk, whatever became of their updates."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from fl_server.fleet.roster import Roster
from fl_server.rounds.run import RunSpec, build_round_dir, create_run, save_checkpoint
from fl_server.rounds.spool import Spool
from fl_server.spent import keep_spent, recover_spent
from models.contract.ledger import LedgerHead, Spent
from models.contract.privacy import Unit
from models.tensors.layout import Layout
from tests.simulators.runs import build_spec

SPEC = build_spec(layout=Layout(names=("bias",), shapes=((2,),)))
ROUND = Spent(model="digits", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal("1.5"), steps=10)
PARAMETERS = np.zeros(2, np.float32)


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    return Roster(tmp_path / "coordinator.db")


def add_run(runs_dir: Path, spec: RunSpec, *, completed: int, spooled: str) -> None:
    """Make a run of which device-2 missed every round, and the last was never completed."""
    run_dir = runs_dir / spec.run
    create_run(run_dir, spec, PARAMETERS)
    for number in range(1, completed + 1):
        save_checkpoint(
            run_dir, spec.layout, PARAMETERS, number=number, accepted=("device-1",), missing=("device-2",), seconds=1.0
        )
    Spool(build_round_dir(run_dir, completed + 1) / "updates", 2).add(spooled, PARAMETERS)


def test_rounds_on_disk_are_counted_once_a_device_however_often_they_are_read(tmp_path: Path, roster: Roster) -> None:
    add_run(tmp_path / "runs", SPEC, completed=2, spooled="device-2")
    add_run(tmp_path / "runs", replace(SPEC, run="run-2", model="other"), completed=1, spooled="device-1")
    for _ in range(2):  # as after two starts of the coordinator
        recover_spent(roster, tmp_path / "runs")
    keep_spent(roster, SPEC, 2, ("device-1",))
    twenty = replace(ROUND, steps=20)
    assert roster.get_ledger("device-1").spent == (twenty, replace(twenty, model="other"))
    assert roster.get_ledger("device-2").spent == (ROUND,)
    assert roster.get_ledger("device-3") == LedgerHead()


def test_device_that_says_itself_what_it_spent_is_not_charged_twice(roster: Roster) -> None:
    said = LedgerHead(entries=1, digest="b" * 64, spent=(ROUND,))
    roster.save_ledger("device-1", said, run="run-1", round_number=1)
    keep_spent(roster, SPEC, 1, ("device-1",))
    assert roster.get_ledger("device-1") == said
    keep_spent(roster, SPEC, 2, ("device-1",))  # no word of this one has come yet
    both = replace(ROUND, steps=20)
    assert roster.get_ledger("device-1").spent == (both,)
    roster.save_ledger("device-1", replace(said, entries=2, spent=(both,)), run="run-1", round_number=2)
    assert roster.get_ledger("device-1").spent == (both,)


def test_run_of_the_device_unit_is_paid_as_a_whole_with_the_first_round_that_a_device_is_in(
    tmp_path: Path, roster: Roster
) -> None:
    spec = replace(SPEC, privacy=replace(SPEC.privacy, unit=Unit.DEVICE))
    whole = replace(ROUND, steps=spec.training.rounds)
    add_run(tmp_path / "runs", spec, completed=2, spooled="device-2")
    recover_spent(roster, tmp_path / "runs")
    keep_spent(roster, spec, 2, ("device-1",))
    assert roster.get_ledger("device-1").spent == (whole,)
    said = LedgerHead(entries=1, digest="b" * 64, spent=(whole,))
    roster.save_ledger("device-2", said, run=spec.run, round_number=3)  # its own word comes late, and earlier
    roster.save_ledger("device-3", LedgerHead(), run=spec.run, round_number=0)
    roster.save_ledger("device-3", said, run=spec.run, round_number=3)
    keep_spent(roster, spec, 3, ("device-2", "device-3"))
    assert roster.get_ledger("device-2").spent == roster.get_ledger("device-3").spent == (whole,)
    seen = replace(spec, run="run-2", privacy=replace(spec.privacy, participation="visible"))
    keep_spent(roster, seen, 1, ("device-1",))
    assert roster.get_ledger("device-1").spent == (whole, replace(whole, sampling_rate=Decimal(1)))


def test_device_that_reports_more_kinds_than_a_copy_holds_keeps_the_copy_it_had(
    roster: Roster, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = tuple(replace(ROUND, noise_multiplier=Decimal(z)) for z in range(1, 65))
    roster.save_ledger("device-1", LedgerHead(spent=kinds), run="run-1", round_number=0)
    keep_spent(roster, SPEC, 1, ("device-1",))
    assert "65 kinds of steps" in caplog.text
    assert roster.get_ledger("device-1").spent == kinds
