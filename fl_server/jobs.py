"""Jobs: what an operator's command asks of the running coordinator; durable, so a restart goes on with them."""

import time
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Literal

from fl_server.database import Database
from fl_server.errors import ServerError
from fl_server.rollout.plan import RolloutPlan
from fl_server.rounds.optimizers import FEDAVG, ServerOptimizer
from fl_server.rounds.rule import MEAN, Aggregation
from fl_server.rounds.run import check_quantile
from models.contract.encoding import build_json, parse_json
from models.contract.errors import ContractError
from models.contract.privacy import Participation, TrainingPlan, Unit
from models.contract.terms import Split
from models.contract.topics import check_name

LINES_KEPT = 10_000  # of each job; older ones go: what a device reports must not fill the disk
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    request BLOB NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    ended_at REAL,
    result BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS job_lines (
    number INTEGER PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES jobs (job),
    line TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS lines_of_a_job ON job_lines (job, number);
"""


class JobState(StrEnum):
    """Where a job is; a job that was running when the coordinator ended is resumed."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """Make the version in this folder the champion of its model, or with a split its challenger."""

    version_dir: str
    split: Split | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteRequest:
    """Make a registered version the champion; it is named, so that after a restart it is the same one."""

    model: str
    version: int

    def __post_init__(self) -> None:
        check_name(self.model, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawRequest:
    """Let a version be its model's challenger no more; once more does nothing."""

    model: str
    version: int

    def __post_init__(self) -> None:
        check_name(self.model, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRequest:
    """Let the champion `version` be it no more; if it is none any more, that was done."""

    model: str
    version: int

    def __post_init__(self) -> None:
        check_name(self.model, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """Bring the version in this folder to the fleet in waves."""

    version_dir: str
    plan: RolloutPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SteerRequest:
    """Tell a rollout to go on with `wave`, from 0, to halt or to resume; once more does nothing."""

    model: str
    version: int
    action: Literal["approve", "halt", "resume"]
    wave: int = 0

    def __post_init__(self) -> None:
        check_name(self.model, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Train the champion of `model` in rounds, within epsilon; fields as in the plans and in the run."""

    model: str
    epsilon: Decimal
    delta: Decimal
    sampling_rate: Decimal
    clipping_norm: Decimal
    training: TrainingPlan
    aggregation: Aggregation = MEAN
    unit: Unit = Unit.SAMPLE
    optimizer: ServerOptimizer = FEDAVG
    clipping_quantile: Decimal | None = None
    participation: Participation = "hidden"

    def __post_init__(self) -> None:
        check_name(self.model, "model")
        check_quantile(self.clipping_quantile, self.unit)
        if not (self.epsilon > 0 and 0 < self.delta < 1):
            raise ValueError(f"epsilon {self.epsilon} must be > 0 and delta {self.delta} in (0, 1)")
        if not (0 < self.sampling_rate <= 1 and self.clipping_norm > 0):
            raise ValueError(
                f"sampling_rate {self.sampling_rate} must be in (0, 1] and clipping_norm {self.clipping_norm} > 0"
            )


ReleasingRequest = ReleaseRequest | PromoteRequest | WithdrawRequest | RollbackRequest
Request = ReleasingRequest | RolloutRequest | SteerRequest | TrainRequest
_KINDS: dict[str, type[Request]] = {
    "release": ReleaseRequest,
    "promote": PromoteRequest,
    "withdraw": WithdrawRequest,
    "rollback": RollbackRequest,
    "rollout": RolloutRequest,
    "steer": SteerRequest,
    "train": TrainRequest,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job as it is on disk; `result` is JSON once it is done, and one line of text if it failed."""

    job: int
    request: Request
    state: JobState
    created_at: float
    result: str | None

    @property
    def is_over(self) -> bool:
        return self.state in (JobState.DONE, JobState.FAILED)


class Jobs(Database):
    """The jobs on disk; every method returns once its effect is durable."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _SCHEMA)

    def add(self, request: Request) -> int:
        """Enqueue `request` and return the job's number."""
        kind = next(name for name, class_ in _KINDS.items() if isinstance(request, class_))
        cursor = self._database.execute(
            "INSERT INTO jobs (kind, request, state, created_at) VALUES (?, ?, ?, ?)",
            (kind, build_json(request), JobState.QUEUED, time.time()),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def get(self, job: int) -> Job:
        """Return the job; raises ServerError if there is none that this version of fl-server can read."""
        row = self._database.execute("SELECT * FROM jobs WHERE job = ?", (job,)).fetchone()
        if row is None:
            raise ServerError(f"there is no job {job}")
        try:
            request = parse_json(row["request"], _KINDS[row["kind"]])
        except (KeyError, ContractError) as error:
            raise ServerError(f"job {job} is not one that this version of fl-server knows: {error}") from error
        return Job(
            job=row["job"],
            request=request,
            state=JobState(row["state"]),
            created_at=row["created_at"],
            result=None if row["result"] is None else row["result"].decode(),
        )

    def find_next(self, *, trains: bool) -> Job | None:
        """Return the training run, or the other job, to do now: the one that was interrupted, else the oldest queued.

        A run waits for all that was asked for before it, and nothing waits for a run. A job that cannot be read has
        failed: it must not keep those behind it waiting, nor end the coordinator.
        """
        rows = self._database.execute(
            "SELECT job FROM jobs WHERE state IN ('running', 'queued') AND (kind = 'train') = ?1 AND NOT (?1 AND EXISTS "
            "(SELECT 1 FROM jobs AS others WHERE others.state IN ('running', 'queued') AND others.kind != 'train' "
            "AND others.job < jobs.job)) ORDER BY state = 'queued', job",
            (trains,),
        ).fetchall()
        for row in rows:
            try:
                return self.get(row["job"])
            except ServerError as error:
                self.save_state(row["job"], JobState.FAILED, str(error))
        return None

    def save_state(self, job: int, state: JobState, result: str | None = None) -> None:
        ended_at = time.time() if state in (JobState.DONE, JobState.FAILED) else None
        data = None if result is None else result.encode()
        self._database.execute(
            "UPDATE jobs SET state = ?, result = ?, ended_at = ? WHERE job = ?", (state, data, ended_at, job)
        )

    def add_line(self, job: int, line: str) -> None:
        """Tell whoever follows the job."""
        self._database.execute("INSERT INTO job_lines (job, line) VALUES (?, ?)", (job, line))
        self._database.execute(
            "DELETE FROM job_lines WHERE job = ? AND number <= "
            "(SELECT number FROM job_lines WHERE job = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (job, job, LINES_KEPT),
        )

    def list_lines(self, job: int, *, after: int = 0) -> list[tuple[int, str]]:
        """Return the job's lines with their numbers, from the first whose number is above `after`."""
        query = "SELECT number, line FROM job_lines WHERE job = ? AND number > ? ORDER BY number"
        return [(row["number"], row["line"]) for row in self._database.execute(query, (job, after))]
