"""What a run will ask of the fleet, from what an operator asked for; pure but for the accountant's arithmetic."""

import math
from decimal import ROUND_UP, Decimal

from fl_server.config import ServerSettings
from fl_server.directory import Directory
from fl_server.errors import UsageError
from fl_server.jobs import TrainRequest
from fl_server.privacy.calibration import build_privacy_plan
from fl_server.rounds.mechanism import compute_expected_cohort, compute_sum_noise
from fl_server.rounds.run import RunSpec
from models.contract.manifest import ModelManifest
from models.contract.privacy import ADAM_DECAYS, PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Layout
from models.tensors.uplink import STRETCH_MAX

_ROUNDING = Decimal("1.001")  # float32, on a bound that can be met exactly
NORM_ALLOWANCE = 8.0  # an honest step may draw some times the expected batch


def build_spec(
    run: str,
    request: TrainRequest,
    *,
    champion: ModelManifest,
    layout: Layout,
    devices: dict[str, int],
    settings: ServerSettings,
    directory: Directory,
) -> RunSpec:
    """Return the specification of `run`, its noise calibrated to the requested epsilon.

    Args:
        run: Its name.
        request: What was asked for.
        champion: The version that the run starts from.
        layout: Of its parameters that travel.
        devices: Flower node ids by device id, at least one.
        settings: The coordinator's.
        directory: The coordinator's.

    Raises:
        UsageError: No noise keeps the budget, or the devices are too few for the rule of aggregation.
    """
    training, aggregation = request.training, request.aggregation
    privacy = build_privacy(request, devices=len(devices))
    expected = len(devices) if privacy.unit is Unit.SAMPLE else compute_expected_cohort(privacy, len(devices))
    return RunSpec(
        fleet=settings.fleet,
        model=request.model,
        run=run,
        graph_digest=champion.step_digest,
        layout=layout,
        privacy=privacy,
        training=training,
        devices=devices,
        quorum=max(math.ceil(settings.rounds.quorum * expected), aggregation.least_updates),
        deadline_s=settings.rounds.deadline_s,
        join_timeout_s=settings.rounds.join_timeout_s,
        superlink=settings.superlink.address,
        ca_path=str(directory.ca_path),
        superexec_secret_path=str(directory.superexec_secret_path),
        order_key_path=str(directory.order_key_path),
        update_norm_limit=compute_norm_limit(privacy, training, layout.size),
        aggregation=aggregation,
        optimizer=request.optimizer,
        clipping_quantile=request.clipping_quantile,
    )


def build_privacy(request: TrainRequest, *, devices: int) -> PrivacyPlan:
    """Return the plan whose noise keeps the budget of `request` with so many `devices` enrolled.

    Raises:
        UsageError: Nothing can keep it, it promises nothing, or the devices are too few.
    """
    if request.unit is Unit.DEVICE and request.delta * devices > 1:
        raise UsageError(
            f"--delta is {request.delta}, above 1/{devices}, one by the number of devices: that would allow to publish "
            "one of them as it is"
        )
    privacy = build_privacy_plan(
        unit=request.unit,
        clipping_norm=request.clipping_norm,
        sampling_rate=request.sampling_rate,
        delta=request.delta,
        epsilon=request.epsilon,
        steps=request.training.steps,
        rounds=request.training.rounds,
        participation=request.participation,
    )
    try:
        request.aggregation.check_fits(privacy.unit, devices=devices)
        is_adaptive = request.clipping_quantile is not None
        compute_sum_noise(privacy, compute_expected_cohort(privacy, devices), is_adaptive=is_adaptive)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return privacy


def compute_norm_limit(privacy: PrivacyPlan, training: TrainingPlan, size: int) -> Decimal:
    """Return the L2 norm that an honest update of `size` parameters stays below, but for a negligible chance.

    A step of SGD moves by its sum of clipped gradients plus noise of standard deviation z * C in each parameter,
    divided by the expected batch; momentum stretches what it moves by 1 / (1 - momentum) at most, and FedProx only
    shortens it. A step of Adam moves each parameter by a bounded share of the learning rate, whatever the gradient.
    Rounding to int8 stretches an update by a bounded share, too.
    """
    stretch = STRETCH_MAX if training.uplink == "int8" else 1.0
    if training.optimizer == "adam":
        ratios = (_bound_adam_ratio(t) for t in range(1, training.steps + 1))
        limit = stretch * float(training.learning_rate) * math.sqrt(size) * sum(ratios)
        return (Decimal(limit) * _ROUNDING).quantize(Decimal("0.000001"), rounding=ROUND_UP)
    clipping_norm, expected_batch = float(privacy.clipping_norm), float(training.expected_batch)
    signal = NORM_ALLOWANCE * clipping_norm
    noise = 2 * float(privacy.noise_multiplier) * clipping_norm * math.sqrt(size) / expected_batch
    step = stretch * float(training.learning_rate) * (signal + noise) / (1 - float(training.momentum))
    return Decimal(training.steps * step).quantize(Decimal("0.000001"), rounding=ROUND_UP)


def _bound_adam_ratio(step: int) -> float:
    """Return what Adam's mean over the root of its mean square is at most at `step`, from 1, by Cauchy and Schwarz."""
    of_mean, of_square = ADAM_DECAYS
    shrink = of_mean**2 / of_square
    spread = (1 - shrink**step) / (1 - shrink)
    return (1 - of_mean) / (1 - of_mean**step) * math.sqrt(spread * (1 - of_square**step) / (1 - of_square))
