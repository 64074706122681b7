"""What a version says of its own privacy."""

from decimal import Decimal

from fl_server.privacy.calibration import Phase, compute_epsilon, round_epsilon_up
from models.contract.privacy import PrivacyPlan, PrivacyStatement

MECHANISM = "DP-SGD on the device, Poisson sampling, Gaussian noise"
ACCOUNTANT = "RDP, one record added or removed"
TRUST_MODEL = (
    "Protects each record against everyone who sees the device's updates, provided the offline signer of the "
    "step graph is honest; on load the device also measures the graph's replace-one sensitivity on random data "
    "(this catches mistakes, not malice) and holds the owner's own limits (smallest noise multiplier, largest "
    "epsilon) over any plan. A person with k records loses more than k times epsilon."
)


def build_statement(
    plan: PrivacyPlan, *, steps: int, rounds_done: int, cohort: int, earlier: tuple[Phase, ...] = ()
) -> PrivacyStatement:
    """Return the statement of a version made by `rounds_done` rounds of `steps` steps under `plan`.

    Args:
        plan: Of unit `sample`.
        steps: Of one round.
        rounds_done: Completed so far; 0 for a version that saw no private data.
        cohort: Devices that a round expects.
        earlier: What other runs have asked of the same records; counted in a version that saw data.
    """
    saw_data = rounds_done > 0
    phase = Phase(sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps * rounds_done)
    return PrivacyStatement(
        unit=plan.unit,
        epsilon=round_epsilon_up(compute_epsilon((*earlier, phase), plan.delta)) if saw_data else Decimal(0),
        delta=plan.delta,
        mechanism=MECHANISM,
        accountant=ACCOUNTANT,
        expected_cohort=cohort if saw_data else 0,
        trust_model=TRUST_MODEL,
    )
