"""One run on disk: what was asked for, and every completed round.

RUN_DIR/run.json
RUN_DIR/rounds/0000/parameters.safetensors            where the run starts
RUN_DIR/rounds/0001/parameters.safetensors            after round 1
RUN_DIR/rounds/0001/moments.safetensors               of the server's optimiser
RUN_DIR/rounds/0001/checkpoint.json                   written last: without it round 1 is not complete
RUN_DIR/rounds/0002/cohort.json                       who was drawn for round 2, before anybody was asked
RUN_DIR/rounds/0002/updates/DEVICE.f32                accepted in round 2, which is under way
RUN_DIR/sequence                                      the last sequence that an order may have

A round without its checkpoint has not happened: its updates are kept, its parameters are written anew.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fl_server.errors import RunError
from fl_server.rounds.optimizers import FEDAVG, Moments, ServerOptimizer
from fl_server.rounds.rule import MEAN, Aggregation
from models.contract.encoding import build_digest, build_json, check_digest_text, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.contract.topics import check_name
from models.tensors.layout import Layout, Vector

SPEC_NAME = "run.json"
PARAMETERS_NAME = "parameters.safetensors"
CHECKPOINT_NAME = "checkpoint.json"
MOMENTS_NAME = "moments.safetensors"
COHORT_NAME = "cohort.json"
SEQUENCE_NAME = "sequence"
SPEC_MAX_BYTES = 64 * 1024 * 1024  # written by the coordinator itself; about 60 bytes a device


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What a run is asked to do. Paths are text, since JSON has no other.

    Attributes:
        graph_digest: Of the graph that says what is trained, as devices have it.
        layout: Of the parameters that travel; what is local to a device is in no file of the run.
        devices: Flower node ids by device id.
        quorum: Least updates that make a round; 1 to the number of devices. A smaller cohort that was drawn needs all.
        deadline_s: Of one round, from its first message to its last update; > 0.
        join_timeout_s: How long the run waits for its devices to come online; > 0.
        superlink: HOST:PORT of the SuperLink.
        ca_path: Its certificate authority, PEM.
        superexec_secret_path: The secret with which ServerApp tasks are claimed.
        order_key_path: Ed25519 private key that signs train orders, PEM.
        update_norm_limit: Largest L2 norm an update may have; > 0.
        aggregation: What makes one step of a round's updates; the quorum is at least what it needs.
        optimizer: What moves the parameters by that step.
        clipping_quantile: Share of updates that the clipping norm of unit `device` is to leave uncut, round by round
            from the plan's on; (0, 1). None fixes it.
    """

    schema_version: Literal[1] = 1
    fleet: str
    model: str
    run: str
    graph_digest: str
    layout: Layout
    privacy: PrivacyPlan
    training: TrainingPlan
    devices: dict[str, int]
    quorum: int
    deadline_s: float
    join_timeout_s: float
    superlink: str
    ca_path: str
    superexec_secret_path: str
    order_key_path: str
    update_norm_limit: Decimal
    aggregation: Aggregation = MEAN
    optimizer: ServerOptimizer = FEDAVG
    clipping_quantile: Decimal | None = None

    def __post_init__(self) -> None:
        check_name(self.fleet, "fleet")
        check_name(self.model, "model")
        check_name(self.run, "run")
        check_digest_text(self.graph_digest)
        for device_id in self.devices:
            check_name(device_id, "device id")
        if not 1 <= self.quorum <= len(self.devices):
            raise ValueError(f"quorum is {self.quorum}, must be in 1..{len(self.devices)}, the number of devices")
        if not (self.deadline_s > 0 and self.join_timeout_s > 0):
            raise ValueError("deadline_s and join_timeout_s must be > 0")
        if not (self.update_norm_limit.is_finite() and self.update_norm_limit > 0):
            raise ValueError(f"update_norm_limit is {self.update_norm_limit}, must be finite and > 0")
        self.aggregation.check_fits(self.privacy.unit, devices=self.quorum)
        check_quantile(self.clipping_quantile, self.privacy.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One completed round.

    Attributes:
        parameters_digest: Of the round's parameters file.
        accepted: Devices whose updates are in the mean.
        missing: Devices that were to take part and did not answer, or whose update was refused.
        clipping_norm: Of the next round; None where the plan's holds.
    """

    schema_version: Literal[1] = 1
    round: int
    parameters_digest: str
    accepted: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float
    clipping_norm: Decimal | None = None


def check_quantile(quantile: Decimal | None, unit: Unit) -> None:
    """Raise ValueError unless clipping norms of `unit` can follow `quantile`."""
    if quantile is None:
        return
    if unit is not Unit.DEVICE:
        raise ValueError(
            "a clipping quantile is of unit device: a sample's gradients have the norm that the plan fixes"
        )
    if not 0 < quantile < 1:
        raise ValueError(f"clipping quantile is {quantile}, must be in (0, 1)")


def create_run(run_dir: Path, spec: RunSpec, parameters: Vector) -> None:
    """Create `run_dir` with `spec` and the flat `parameters` to start from, shape (layout.size,)."""
    directory = build_round_dir(run_dir, 0)
    directory.mkdir(parents=True, exist_ok=True)
    save_atomically(directory / PARAMETERS_NAME, save(spec.layout.unflatten(parameters)))
    save_atomically(run_dir / SPEC_NAME, build_json(spec))


def load_spec(run_dir: Path) -> RunSpec:
    """Return the specification in `run_dir`; raises RunError."""
    path = run_dir / SPEC_NAME
    try:
        return parse_json(path.read_bytes(), RunSpec, max_bytes=SPEC_MAX_BYTES)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except ContractError as error:
        raise RunError(f"{path}: {error}") from error


def build_round_dir(run_dir: Path, number: int) -> Path:
    return run_dir / "rounds" / f"{number:04d}"


def load_parameters(run_dir: Path, layout: Layout, number: int) -> Vector:
    """Return the parameters after round `number`, shape (layout.size,); raises RunError."""
    path = build_round_dir(run_dir, number) / PARAMETERS_NAME
    try:
        return layout.flatten(load(path.read_bytes()))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{path}: {error}") from error


def load_checkpoint(run_dir: Path, *, only_newest: bool = False) -> Checkpoint | None:
    """Return the newest completed round whose parameters are whole, or None before the first.

    Args:
        run_dir: Of the run.
        only_newest: Whether to go on from an older round is wrong: what came of the newest was seen.

    Raises:
        RunError: The newest completed round is damaged, and no other will do.
    """
    completed = max(_list_completed(run_dir), default=0)
    for checkpoint in load_checkpoints(run_dir):
        if only_newest and checkpoint.round != completed:
            break
        try:
            parameters = (build_round_dir(run_dir, checkpoint.round) / PARAMETERS_NAME).read_bytes()
        except OSError:
            continue
        if build_digest(parameters) == checkpoint.parameters_digest:
            return checkpoint
    if only_newest and completed:
        raise RunError(
            f"{build_round_dir(run_dir, completed)} is damaged: round {completed} would be released a second time, with "
            "other noise, and was paid for once"
        )
    return None


def load_checkpoints(run_dir: Path) -> Iterator[Checkpoint]:
    """Yield the completed rounds, newest first; one that cannot be read is left out."""
    for number in sorted(_list_completed(run_dir), reverse=True):
        with contextlib.suppress(OSError, ContractError):
            path = build_round_dir(run_dir, number) / CHECKPOINT_NAME
            yield parse_json(path.read_bytes(), Checkpoint, max_bytes=SPEC_MAX_BYTES)


def _list_completed(run_dir: Path) -> list[int]:
    return [int(path.parent.name) for path in (run_dir / "rounds").glob(f"[0-9]*/{CHECKPOINT_NAME}")]


def save_checkpoint(
    run_dir: Path,
    layout: Layout,
    parameters: Vector,
    *,
    number: int,
    accepted: tuple[str, ...],
    missing: tuple[str, ...],
    seconds: float,
    clipping_norm: Decimal | None = None,
) -> Checkpoint:
    """Make round `number` complete, durably; its parameters first, then the word that they count."""
    directory = build_round_dir(run_dir, number)
    directory.mkdir(parents=True, exist_ok=True)
    document = save(layout.unflatten(np.ascontiguousarray(parameters)))
    save_atomically(directory / PARAMETERS_NAME, document)
    checkpoint = Checkpoint(
        round=number,
        parameters_digest=build_digest(document),
        accepted=accepted,
        missing=missing,
        seconds=seconds,
        clipping_norm=clipping_norm,
    )
    save_atomically(directory / CHECKPOINT_NAME, build_json(checkpoint))
    return checkpoint


def load_moments(run_dir: Path, number: int) -> Moments:
    """Return the optimiser's moments after round `number`; raises RunError."""
    path = build_round_dir(run_dir, number) / MOMENTS_NAME
    try:
        arrays = load(path.read_bytes())
        return Moments(arrays["first"], arrays["second"])
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError) as error:
        raise RunError(f"{path}: {error}") from error


def save_moments(run_dir: Path, number: int, moments: Moments) -> None:
    """Keep the optimiser's moments after round `number`, durably; to be done before its checkpoint."""
    directory = build_round_dir(run_dir, number)
    directory.mkdir(parents=True, exist_ok=True)
    save_atomically(directory / MOMENTS_NAME, save({"first": moments.first, "second": moments.second}))


def load_cohort(run_dir: Path, number: int) -> tuple[str, ...] | None:
    """Return who was drawn for round `number`, or None before the draw; raises RunError."""
    path = build_round_dir(run_dir, number) / COHORT_NAME
    try:
        return parse_json(path.read_bytes(), tuple[str, ...], max_bytes=SPEC_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except ContractError as error:
        raise RunError(f"{path}: {error}") from error


def save_cohort(run_dir: Path, number: int, cohort: tuple[str, ...]) -> None:
    """Fix who takes part in round `number`, durably: a draw that is repeated until it pleases is none."""
    directory = build_round_dir(run_dir, number)
    directory.mkdir(parents=True, exist_ok=True)
    save_atomically(directory / COHORT_NAME, build_json(cohort))


def load_sequence(run_dir: Path) -> int:
    """Return the last sequence that an order of this run may have had, 0 before the first; raises RunError."""
    path = run_dir / SEQUENCE_NAME
    try:
        return int(path.read_bytes())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{path}: holds no number") from error


def save_sequence(run_dir: Path, sequence: int) -> None:
    """Use up all sequences to `sequence`, durably: orders must not fall behind it, even if the clock does."""
    save_atomically(run_dir / SEQUENCE_NAME, str(sequence).encode())
