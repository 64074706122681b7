"""What a device's privacy ledger comes to: reported by the device, kept and signed by the coordinator.

Plans and orders determine all of it; nothing here derives from a device's samples.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeAlias

from models.contract.encoding import build_digest, check_digest_text
from models.contract.topics import check_name

SPENT_MAX = 64  # kinds of steps; 64 of them, signed and quoted, fit into one message of 16 KiB
FIRST_PREVIOUS = build_digest(b"")  # what the first entry of a ledger follows

_Kind: TypeAlias = tuple[str, Decimal, Decimal]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """All steps of DP-SGD that were taken alike for one model; what they cost follows from these numbers alone.

    Attributes:
        sampling_rate: q; (0, 1].
        noise_multiplier: z; > 0.
        steps: >= 1.
    """

    model: str
    sampling_rate: Decimal
    noise_multiplier: Decimal
    steps: int

    def __post_init__(self) -> None:
        check_name(self.model, "model")
        if not (self.sampling_rate.is_finite() and 0 < self.sampling_rate <= 1):
            raise ValueError(f"sampling_rate is {self.sampling_rate}, must be in (0, 1]")
        if not (self.noise_multiplier.is_finite() and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}, must be finite and > 0")
        if not 1 <= self.steps < 2**53:
            raise ValueError(f"steps is {self.steps}, must be in 1..2**53")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerHead:
    """What a ledger comes to; the default is that of a device that has never spent anything.

    Attributes:
        entries: How many it has.
        digest: Of the last.
        spent: Each kind of steps once; at most `SPENT_MAX`.
    """

    entries: int = 0
    digest: str = FIRST_PREVIOUS
    spent: tuple[Spent, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        check_digest_text(self.digest)
        if self.entries < 0:
            raise ValueError(f"entries is {self.entries}, must be >= 0")
        if len(self.spent) > SPENT_MAX or len(_count(self.spent)) < len(self.spent):
            raise ValueError(f"spent must have at most {SPENT_MAX} kinds of steps, each once")


def add_up(spent: Iterable[Spent]) -> tuple[Spent, ...]:
    """Return `spent` with each kind of steps once, in a fixed order."""
    return tuple(_build(_count(spent)))


def take_larger(first: Iterable[Spent], second: Iterable[Spent]) -> tuple[Spent, ...]:
    """Return the larger number of each kind of steps: at least what either holds."""
    return tuple(_build(_count(first) | _count(second)))


def find_missing(whole: Iterable[Spent], part: Iterable[Spent]) -> tuple[Spent, ...]:
    """Return the steps of `whole` that `part` does not hold."""
    return tuple(_build(_count(whole) - _count(part)))


def _count(spent: Iterable[Spent]) -> Counter[_Kind]:
    steps: Counter[_Kind] = Counter()
    for kind in spent:
        steps[kind.model, kind.sampling_rate, kind.noise_multiplier] += kind.steps
    return steps


def _build(steps: Counter[_Kind]) -> Iterator[Spent]:
    for (model, sampling_rate, noise_multiplier), count in sorted(steps.items()):
        yield Spent(model=model, sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=count)
