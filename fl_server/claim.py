"""What a version may claim of its privacy, from all that the runs of its model have asked of devices."""

import dataclasses
from pathlib import Path

from fl_server.errors import UsageError
from fl_server.privacy.calibration import Phase, count_steps
from fl_server.privacy.statement import build_statement
from fl_server.rounds.run import SPEC_NAME, RunSpec, load_checkpoint, load_spec
from models.contract.manifest import ModelManifest
from models.contract.privacy import PrivacyPlan, PrivacyStatement, Unit


def build_claim(runs_dir: Path, spec: RunSpec, number: int, base: ModelManifest) -> PrivacyStatement:
    """Return what holds for a version after round `number`, against all who saw any update of any run.

    The same records may have been in every run of the model, and an update was seen whether or not a version
    came of it.

    Args:
        runs_dir: All runs, that of `spec` among them.
        spec: The run that made the version.
        number: Completed rounds.
        base: The version that the run started from.

    Raises:
        RunError: A run's specification is damaged.
    """
    statement = build_statement(
        spec.privacy,
        steps=spec.training.steps,
        rounds_done=number,
        cohort=count_cohort(spec.privacy, len(spec.devices)),
        earlier=_load_earlier(runs_dir, spec),
    )
    is_counted = base.lineage.run is not None and (runs_dir / base.lineage.run / SPEC_NAME).exists()
    if base.privacy is None or is_counted:
        return statement
    # It was made elsewhere: of two runs whose steps are not all known, epsilons and deltas add up.
    epsilon, delta = statement.epsilon + base.privacy.epsilon, statement.delta + base.privacy.delta
    return dataclasses.replace(statement, epsilon=epsilon, delta=delta)


def check_unit(runs_dir: Path, model: str, unit: Unit) -> None:
    """Raise UsageError if a run of `model` had another unit than `unit`: no version could claim either.

    Raises:
        RunError: A run's specification is damaged.
    """
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
