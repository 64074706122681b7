import sqlite3
from decimal import Decimal

import pytest

from fl_server.errors import ServerError
from fl_server.jobs import (
    Jobs,
    JobState,
    PromoteRequest,
    ReleaseRequest,
    RollbackRequest,
    RolloutRequest,
    SteerRequest,
    TrainRequest,
    WithdrawRequest,
)
from fl_server.rollout.plan import RolloutPlan
from models.contract.privacy import TrainingPlan
from models.contract.terms import Split
from models.contract.wave import Requirements

TRAIN = TrainRequest(
    model="digits",
    epsilon=Decimal(8),
    delta=Decimal("0.001"),
    sampling_rate=Decimal("0.25"),
    clipping_norm=Decimal(1),
    training=TrainingPlan(rounds=3, steps=5, expected_batch=Decimal(32), learning_rate=Decimal("0.5")),
)
RELEASE = ReleaseRequest(version_dir="/v1")


@pytest.fixture
def jobs(tmp_path):
    with Jobs(tmp_path / "coordinator.db") as jobs:
        yield jobs


def test_request_comes_back_as_it_was_asked(jobs):
    assert jobs.get(jobs.add(TRAIN)).request == TRAIN
    assert jobs.get(jobs.add(RELEASE)).request == RELEASE
    challenger = ReleaseRequest(version_dir="/v2", split=Split(weight=Decimal("0.1")))
    assert jobs.get(jobs.add(challenger)).request == challenger
    plan = RolloutPlan(waves=(Decimal(1), Decimal(100)), devices=("a",), requirements=Requirements(hardware=("arm",)))
    for request in (
        PromoteRequest(model="digits", version=2),
        WithdrawRequest(model="digits", version=2),
        RollbackRequest(model="digits", version=2),
        RolloutRequest(version_dir="/v2", plan=plan),
        SteerRequest(model="digits", version=2, action="approve", wave=1),
    ):
        assert jobs.get(jobs.add(request)).request == request


def test_jobs_are_done_in_order_and_an_interrupted_one_goes_on_first(jobs):
    first, second = jobs.add(RELEASE), jobs.add(ReleaseRequest(version_dir="/v2"))
    assert jobs.find_next(trains=False).job == first
    jobs.save_state(second, JobState.RUNNING)
    assert jobs.find_next(trains=False).job == second
    jobs.save_state(second, JobState.DONE, "{}")
    jobs.save_state(first, JobState.FAILED, "no such folder")
    assert jobs.find_next(trains=False) is None
    assert (jobs.get(first).result, jobs.get(second).result) == ("no such folder", "{}")
    assert jobs.get(first).is_over


def test_run_waits_for_what_was_asked_before_it_and_nothing_waits_for_a_run(jobs):
    release, run, other = jobs.add(RELEASE), jobs.add(TRAIN), jobs.add(TRAIN)
    halt = jobs.add(SteerRequest(model="digits", version=2, action="halt"))
    assert jobs.find_next(trains=True) is None
    jobs.save_state(release, JobState.DONE, "{}")
    assert jobs.find_next(trains=True).job == run
    jobs.save_state(run, JobState.RUNNING)
    assert jobs.find_next(trains=False).job == halt
    assert jobs.find_next(trains=True).job == run
    jobs.save_state(run, JobState.DONE, "{}")
    assert jobs.find_next(trains=True).job == other


def test_a_job_of_another_version_fails_and_the_next_one_is_done(jobs, tmp_path):
    unknown, old, good = jobs.add(RELEASE), jobs.add(TRAIN), jobs.add(RELEASE)
    with sqlite3.connect(tmp_path / "coordinator.db") as database:
        database.execute("UPDATE jobs SET kind = 'migrate' WHERE job = ?", (unknown,))
        database.execute("UPDATE jobs SET request = x'7b7d' WHERE job = ?", (old,))
    database.close()
    assert jobs.find_next(trains=False).job == good
    assert jobs.find_next(trains=True) is None
    jobs.save_state(good, JobState.DONE, "{}")
    assert jobs.find_next(trains=True) is None
    with pytest.raises(ServerError, match=f"job {old} is not one that this version"):
        jobs.get(old)


def test_lines_of_a_job_are_read_from_where_a_reader_was(jobs, tmp_path):
    job, other = jobs.add(TRAIN), jobs.add(TRAIN)
    jobs.add_line(job, "one")
    jobs.add_line(other, "not mine")
    with Jobs(tmp_path / "coordinator.db") as reader:
        [(seen, line)] = reader.list_lines(job)
        assert line == "one"
        jobs.add_line(job, "two")
        assert [line for _, line in reader.list_lines(job, after=seen)] == ["two"]


def test_lines_of_a_job_are_bounded_and_the_newest_stay(jobs, monkeypatch):
    monkeypatch.setattr("fl_server.jobs.LINES_KEPT", 3)
    job, other = jobs.add(TRAIN), jobs.add(TRAIN)
    jobs.add_line(other, "not mine")
    for number in range(5):
        jobs.add_line(job, str(number))
    assert [line for _, line in jobs.list_lines(job)] == ["2", "3", "4"]
    assert [line for _, line in jobs.list_lines(other)] == ["not mine"]


def test_unknown_job_is_an_error(jobs):
    with pytest.raises(ServerError, match="no job 7"):
        jobs.get(7)


@pytest.mark.parametrize(
    "changed", [{"epsilon": Decimal(0)}, {"delta": Decimal(1)}, {"sampling_rate": Decimal(2)}, {"model": "a/b"}]
)
def test_request_out_of_range_is_refused(changed):
    fields = {name: getattr(TRAIN, name) for name in TrainRequest.__dataclass_fields__}
    with pytest.raises(ValueError, match=str(next(iter(changed)))):
        TrainRequest(**{**fields, **changed})
