"""What a version may claim of its privacy, from all that the runs of its model have asked of devices."""

import dataclasses
from pathlib import Path

from fl_server.errors import RunError, UsageError
from fl_server.privacy.calibration import Phase, count_steps
from fl_server.privacy.statement import build_statement
from fl_server.rounds.run import SPEC_NAME, RunSpec, load_checkpoint, load_spec
from models.contract.errors import ContractError
from models.contract.manifest import ModelManifest, parse_manifest
from models.contract.privacy import PrivacyPlan, PrivacyStatement, Unit

BASE_NAME = "base.json"  # in a run's folder: the manifest of the version that it starts from


def build_claim(runs_dir: Path, spec: RunSpec, number: int) -> PrivacyStatement:
    """Return what holds for a version after round `number`, against all who saw any update of any run.

    The same records may have been in every run of the model, and an update was seen whether or not a version
    came of it.

    Args:
        runs_dir: All runs, that of `spec` among them.
        spec: The run that made the version.
        number: Completed rounds.

    Raises:
        RunError: A run's specification, or the manifest of what it started from, is damaged.
    """
    statement = build_statement(
        spec.privacy,
        steps=spec.training.steps,
        rounds_done=number,
        cohort=count_cohort(spec.privacy, len(spec.devices)),
        earlier=_load_earlier(runs_dir, spec),
    )
    # Of runs whose steps are not all known, epsilons and deltas add up.
    foreign = _load_foreign(runs_dir, spec.model).values()
    epsilon = sum((other.epsilon for other in foreign), statement.epsilon)
    delta = sum((other.delta for other in foreign), statement.delta)
    return dataclasses.replace(statement, epsilon=epsilon, delta=delta)


def load_base(run_dir: Path) -> ModelManifest:
    """Return the manifest of the version that the run in `run_dir` started from; raises RunError."""
    path = run_dir / BASE_NAME
    try:
        return parse_manifest(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except ContractError as error:
        raise RunError(f"{path}: {error}") from error


def check_unit(runs_dir: Path, base: ModelManifest, unit: Unit) -> None:
    """Raise UsageError if a run of the model of `base`, or `base` itself, had another unit than `unit`.

    No version could claim either.

    Raises:
        RunError: A run's specification is damaged.
    """
    model = base.model
    if base.privacy is not None and base.privacy.epsilon and base.privacy.unit is not unit:
        raise UsageError(
            f"version {base.version} of {model} claims the privacy unit {base.privacy.unit.value}; no version that comes "
            f"of it could claim what {unit.value} promises: give the model another name"
        )
    for path in sorted(runs_dir.glob(f"*/{SPEC_NAME}")):
        earlier = load_spec(path.parent)
        if earlier.model == model and earlier.privacy.unit is not unit:
            raise UsageError(
                f"run {earlier.run} trained {model} under the privacy unit {earlier.privacy.unit.value}; no version could "
                f"claim what {unit.value} promises for all of its runs: give the model another name"
            )


def count_cohort(plan: PrivacyPlan, enrolled: int) -> int:
    """Return how many devices a round expects, as a version says it."""
    return enrolled if plan.unit is Unit.SAMPLE else max(1, round(plan.sampling_rate * enrolled))


def _load_foreign(runs_dir: Path, model: str) -> dict[str | None, PrivacyStatement]:
    """Return, by run, what was claimed by versions from elsewhere that runs of `model` started from.

    Also those of a run whose folder was removed: its steps are not known any more.
    """
    foreign: dict[str | None, PrivacyStatement] = {}
    for path in sorted(runs_dir.glob(f"*/{SPEC_NAME}")):
        base = load_base(path.parent)
        if base.model != model or base.privacy is None:
            continue
        run = base.lineage.run
        if run is not None and (runs_dir / run / SPEC_NAME).exists():
            continue
        known = foreign.get(run)
        if known is None or known.epsilon < base.privacy.epsilon:
            foreign[run] = base.privacy
    return foreign


def _load_earlier(runs_dir: Path, spec: RunSpec) -> tuple[Phase, ...]:
    """Return the steps of the model's other runs, those of the round in which one ended early included."""
    phases = []
    for path in sorted(runs_dir.glob(f"*/{SPEC_NAME}")):
        earlier = load_spec(path.parent)
        if earlier.model != spec.model or earlier.run == spec.run:
            continue
        checkpoint = load_checkpoint(path.parent)
        asked = min((checkpoint.round if checkpoint else 0) + 1, earlier.training.rounds)
        phases.append(
            Phase(
                sampling_rate=earlier.privacy.claimed_rate,
                noise_multiplier=earlier.privacy.noise_multiplier,
                steps=asked * count_steps(earlier.privacy.unit, earlier.training.steps),
            )
        )
    return tuple(phases)
