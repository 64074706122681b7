from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from edge_agent.training.accountant import Phase, compute_epsilon
from fl_server.claim import BASE_NAME, build_claim, check_unit, count_cohort
from fl_server.errors import UsageError
from fl_server.rounds.run import create_run, save_checkpoint
from models.contract.manifest import INFERENCE_NAMES, FileEntry, Lineage, ModelManifest, build_manifest
from models.contract.privacy import PrivacyStatement, Unit
from models.tensors.layout import Layout
from models.tensors.spec import TensorSpec
from tests.simulators.runs import build_spec

LAYOUT = Layout(names=("bias",), shapes=((2,),))
SPEC = build_spec(run="run-2", layout=LAYOUT, devices={"device-1": 1})
BASE = ModelManifest(
    model="digits",
    version=1,
    runtime="onnx",
    inputs=(TensorSpec("x", ("batch", 2), "float32"),),
    outputs=(TensorSpec("y", ("batch", 2), "float32"),),
    files={INFERENCE_NAMES["onnx"]: FileEntry(digest="b" * 64, size_bytes=1)},
)
STATEMENT = PrivacyStatement(
    unit=Unit.SAMPLE,
    epsilon=Decimal(3),
    delta=Decimal("0.001"),
    mechanism="DP-SGD",
    accountant="RDP",
    expected_cohort=8,
    trust_model="",
)
FOREIGN = replace(BASE, privacy=STATEMENT, lineage=Lineage(run="of-another-federation", round=2))


@pytest.fixture
def runs_dir(tmp_path):
    begin(tmp_path, SPEC)
    return tmp_path


def begin(runs_dir, spec, *, base=BASE):
    create_run(runs_dir / spec.run, spec, np.zeros(2, np.float32))
    (runs_dir / spec.run / BASE_NAME).write_bytes(build_manifest(replace(base, model=spec.model)))


def add_run(runs_dir, run, *, rounds_done, model="digits", base=BASE):
    begin(runs_dir, replace(SPEC, run=run, model=model), base=base)
    for number in range(1, rounds_done + 1):
        save_checkpoint(
            runs_dir / run, LAYOUT, np.zeros(2, np.float32), number=number, accepted=(), missing=(), seconds=1.0
        )


def ledger(*, rounds: int) -> float:
    """Return what a device that took part in `rounds` finds in its ledger."""
    return compute_epsilon([Phase(0.1, 1.5, 10 * rounds)], 0.001)


def test_first_run_claims_its_own_rounds(runs_dir):
    claim = build_claim(runs_dir, SPEC, 2)
    assert float(claim.epsilon) == pytest.approx(ledger(rounds=2), rel=0.01)


def test_rounds_of_earlier_runs_count_though_no_version_came_of_them(runs_dir):
    add_run(runs_dir, "run-1", rounds_done=3)
    claim = build_claim(runs_dir, SPEC, 2)
    assert float(claim.epsilon) == pytest.approx(ledger(rounds=5), rel=0.01)
    assert claim.delta == SPEC.privacy.delta


def test_round_in_which_an_earlier_run_ended_counts_as_its_updates_may_have_been_seen(runs_dir):
    add_run(runs_dir, "run-1", rounds_done=1)
    claim = build_claim(runs_dir, SPEC, 1)
    assert float(claim.epsilon) == pytest.approx(ledger(rounds=3), rel=0.01)


def test_base_of_an_earlier_run_is_not_counted_twice(runs_dir):
    add_run(runs_dir, "run-1", rounds_done=3)
    claim = build_claim(runs_dir, SPEC, 2)
    begin(runs_dir, SPEC, base=replace(BASE, privacy=STATEMENT, lineage=Lineage(run="run-1", round=2)))
    assert build_claim(runs_dir, SPEC, 2) == claim


def test_runs_of_other_models_do_not_count(runs_dir):
    add_run(runs_dir, "run-1", rounds_done=3, model="faces")
    assert float(build_claim(runs_dir, SPEC, 2).epsilon) == pytest.approx(ledger(rounds=2), rel=0.01)


def test_epsilon_of_a_base_made_elsewhere_is_added(runs_dir):
    own = build_claim(runs_dir, SPEC, 2)
    begin(runs_dir, SPEC, base=FOREIGN)
    claim = build_claim(runs_dir, SPEC, 2)
    assert (claim.epsilon, claim.delta) == (own.epsilon + 3, Decimal("0.002"))


def test_epsilon_from_elsewhere_stays_over_the_runs_after_the_first(runs_dir):
    add_run(runs_dir, "run-1", rounds_done=3)
    own = build_claim(runs_dir, SPEC, 2)
    add_run(runs_dir, "run-1", rounds_done=3, base=FOREIGN)
    begin(runs_dir, SPEC, base=replace(BASE, privacy=STATEMENT, lineage=Lineage(run="run-1", round=3)))
    claim = build_claim(runs_dir, SPEC, 2)
    assert (claim.epsilon, claim.delta) == (own.epsilon + 3, Decimal("0.002"))


def test_epsilon_of_a_run_whose_folder_was_removed_stays(runs_dir):
    own = build_claim(runs_dir, SPEC, 2)
    begin(runs_dir, SPEC, base=replace(BASE, privacy=STATEMENT, lineage=Lineage(run="run-0", round=3)))
    assert build_claim(runs_dir, SPEC, 2).epsilon == own.epsilon + 3


def test_claim_of_the_device_unit_counts_the_rounds_of_all_runs_at_the_rate_that_may_be_claimed(tmp_path):
    privacy = replace(SPEC.privacy, unit=Unit.DEVICE)
    runs = {
        "run-1": replace(SPEC, run="run-1", privacy=replace(privacy, participation="visible")),
        "run-2": replace(SPEC, privacy=privacy),
    }
    for spec in runs.values():
        begin(tmp_path, spec)
    claim = build_claim(tmp_path, runs["run-2"], 3)
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(1.5))  # the round in which run-1 ended, whose participants others saw
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.5)), 3))
    assert float(claim.epsilon) == pytest.approx(accountant.get_epsilon(0.001), rel=0.01)


def test_model_is_not_trained_under_two_units(runs_dir):
    check_unit(runs_dir, BASE, Unit.SAMPLE)
    check_unit(runs_dir, replace(BASE, model="faces"), Unit.DEVICE)
    with pytest.raises(UsageError, match="run run-2 trained digits under the privacy unit sample"):
        check_unit(runs_dir, BASE, Unit.DEVICE)


def test_base_that_claims_another_unit_is_not_trained(tmp_path):
    check_unit(tmp_path, FOREIGN, Unit.SAMPLE)
    with pytest.raises(UsageError, match="version 1 of digits claims the privacy unit sample"):
        check_unit(tmp_path, FOREIGN, Unit.DEVICE)


def test_cohort_that_is_claimed_is_the_expected_one():
    assert count_cohort(SPEC.privacy, 40) == 40
    assert count_cohort(replace(SPEC.privacy, unit=Unit.DEVICE), 40) == 4
