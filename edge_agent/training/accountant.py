"""The epsilon of DP-SGD: Renyi differential privacy of the Poisson-subsampled Gaussian mechanism.

Pure, and NumPy only. Neighbours differ by adding or removing one sample. Errs upwards: where a sum
would be too long to take, the bound of the mechanism without subsampling stands in for it.

Sources:
    Mironov, Talwar, Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian Mechanism",
    arXiv:1908.10530: the divergence A(alpha), and that the other direction is never larger.
    Balle et al. 2020, "Hypothesis Testing Interpretations and Renyi Differential Privacy",
    arXiv:1905.09982, Theorem 21: from Renyi to (epsilon, delta).
    Bretagnolle & Huber 1979, doi:10.1007/BFb0064609: where delta covers all that two outputs can differ by.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]

# Those of dp-accounting: dense where epsilon is large, sparse where noise is. So that a plan calibrated
# with dp-accounting's RDP is never refused for the device's choice of orders.
ORDERS: tuple[float, ...] = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
_LEAST_SUBSAMPLED_NOISE = 0.05  # z; below it the quadrature needs more than 20 000 points an order


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of DP-SGD that were taken alike.

    Attributes:
        sampling_rate: q, with which each sample takes part in a step, independently; (0, 1].
        noise_multiplier: z; >= 0, and without any privacy at 0.
        steps: >= 0.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}, must be in (0, 1]")
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}, must be >= 0")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}, must be >= 0")


def compute_epsilon(phases: Iterable[Phase], delta: float) -> float:
    """Return the epsilon of all `phases` together at `delta`, in (0, 1); infinite if one adds no noise."""
    steps: Counter[tuple[float, float]] = Counter()
    for phase in phases:
        steps[phase.sampling_rate, phase.noise_multiplier] += phase.steps
    divergence = np.zeros(len(ORDERS))
    for (sampling_rate, noise_multiplier), count in steps.items():
        if count:  # none of infinitely many would be NaN
            divergence = divergence + count * compute_rdp(sampling_rate, noise_multiplier)
    if not divergence.any():
        return 0.0
    order: _Floats = np.asarray(ORDERS)
    epsilon = divergence + np.log1p(-1 / order) - np.log(delta * order) / (order - 1)
    epsilon[-np.expm1(-divergence) <= delta**2] = 0.0  # total variation is at most sqrt(1 - e^-divergence)
    return max(0.0, float(epsilon.min()))


@lru_cache(maxsize=256)
def compute_rdp(sampling_rate: float, noise_multiplier: float) -> _Floats:
    """Return the Renyi divergence of one step at each of `ORDERS`, in nats."""
    order: _Floats = np.asarray(ORDERS)
    if noise_multiplier == 0:
        return np.full_like(order, math.inf)
    unsampled = order / (2 * noise_multiplier**2)
    if sampling_rate == 1 or noise_multiplier < _LEAST_SUBSAMPLED_NOISE:
        return unsampled  # the divergence is quasi-convex: subsampling never raises it
    log_moments = [
        _log_moment_integer(int(alpha), sampling_rate, noise_multiplier)
        if float(alpha).is_integer()
        else _log_moment(alpha, sampling_rate, noise_multiplier)
        for alpha in ORDERS
    ]
    rdp: _Floats = np.clip(np.asarray(log_moments) / (order - 1), 0, unsampled)
    return rdp


def _log_moment_integer(alpha: int, q: float, z: float) -> float:
    """Return log A(alpha) by its finite sum (arXiv:1908.10530, section 3.3)."""
    k = np.arange(alpha + 1)
    log_factorial = np.asarray([math.lgamma(i + 1) for i in range(alpha + 1)])
    log_binomial = log_factorial[alpha] - log_factorial - log_factorial[::-1]
    return _log_sum(log_binomial + (alpha - k) * math.log1p(-q) + k * math.log(q) + (k * k - k) / (2 * z * z))


def _log_moment(alpha: float, q: float, z: float) -> float:
    """Return log A(alpha) = log E[((1 - q) + q exp((2x - 1) / 2z^2))^alpha], x ~ N(0, z^2), by quadrature.

    The trapezoid rule converges exponentially for an integrand analytic in a strip (Trefethen & Weideman
    2014, doi:10.1137/130932132); here the strip ends at +-i pi z^2, so steps of z^2 / 4 leave less than
    rounding does. Twelve standard deviations beyond both peaks, 0 and alpha, less than e^-70 is left.
    """
    step = min(z, z * z) / 4
    x = np.arange(-12 * z, alpha + 12 * z, step)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z))
    log_density = -x * x / (2 * z * z) - math.log(z * math.sqrt(2 * math.pi))
    return _log_sum(log_density + alpha * log_ratio) + math.log(step)


def _log_sum(logs: _Floats) -> float:
    """Return log sum exp."""
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).sum()))
