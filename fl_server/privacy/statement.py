"""What a version says of its own privacy."""

from decimal import Decimal

from fl_server.privacy.calibration import Phase, compute_epsilon, compute_pld_epsilon, count_steps, round_epsilon_up
from models.contract.privacy import PrivacyPlan, PrivacyStatement, Unit

MECHANISMS = {
    Unit.SAMPLE: "DP-SGD on the device, Poisson sampling, Gaussian noise",
    Unit.DEVICE: "clipped updates of a Poisson cohort, Gaussian noise on their sum, fixed denominator",
}
ACCOUNTANTS = {Unit.SAMPLE: "RDP, one record added or removed", Unit.DEVICE: "PLD, one device added or removed"}
TRUST_MODELS = {
    Unit.SAMPLE: (
        "Protects each record against everyone who sees the device's updates, provided the offline signer of the "
        "step graph is honest; on load the device also measures the graph's replace-one sensitivity on random data "
        "(this catches mistakes, not malice) and holds the owner's own limits (smallest noise multiplier, largest "
        "epsilon) over any plan. A person with k records loses more than k times epsilon."
    ),
    Unit.DEVICE: (
        "Protects all that one device holds against those who see models, trusting the coordinator, which sees each "
        "update before there is noise on it and draws the cohorts."
    ),
}
PARTICIPATION = {
    "hidden": (
        " Amplification by sampling assumes that nobody but the coordinator sees which devices took part: the broker "
        "must let a device alone read its commands, and the coordinator alone what devices say."
    ),
    "visible": " Others may see which devices took part, so no amplification by sampling is claimed.",
}


def build_statement(
    plan: PrivacyPlan, *, steps: int, rounds_done: int, cohort: int, earlier: tuple[Phase, ...] = ()
) -> PrivacyStatement:
    """Return the statement of a version made by `rounds_done` rounds of `steps` steps under `plan`.

    Args:
        plan: Of the run.
        steps: That a device makes in one round.
        rounds_done: Completed so far; 0 for a version that saw no private data.
        cohort: Devices that a round expects.
        earlier: What other runs have asked of the same records or devices; counted in a version that saw data.
    """
    saw_data = rounds_done > 0
    phase = Phase(
        sampling_rate=plan.claimed_rate,
        noise_multiplier=plan.noise_multiplier,
        steps=count_steps(plan.unit, steps) * rounds_done,
    )
    compute = compute_epsilon if plan.unit is Unit.SAMPLE else compute_pld_epsilon
    return PrivacyStatement(
        unit=plan.unit,
        epsilon=round_epsilon_up(compute((*earlier, phase), plan.delta)) if saw_data else Decimal(0),
        delta=plan.delta,
        mechanism=MECHANISMS[plan.unit],
        accountant=ACCOUNTANTS[plan.unit],
        expected_cohort=cohort if saw_data else 0,
        trust_model=TRUST_MODELS[plan.unit] + (PARTICIPATION[plan.participation] if plan.unit is Unit.DEVICE else ""),
    )
