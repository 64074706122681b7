"""The terms of a release: what the signed `custom` of its target says beside digest and size."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeAlias

import msgspec

from models.contract.encoding import build_canonical
from models.contract.errors import MalformedError
from models.contract.wave import Requirements, Wave

PROBATION_MAX_S = 86_400
Role: TypeAlias = Literal["champion", "challenger", "previous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What a challenger does beside the champion; with neither it answers only who names its version.

    Attributes:
        weight: Its share of the requests that name no version, 0 to 1.
        shadow: The champion answers all of them, and the challenger is compared with it.
    """

    weight: Decimal = Decimal(0)
    shadow: bool = False

    def __post_init__(self) -> None:
        if not self.weight.is_finite() or not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}, must be in 0..1")
        if self.shadow and self.weight:
            raise ValueError("weight and shadow: a challenger answers or is compared, not both")

    def __str__(self) -> str:
        if self.shadow:
            return "in the shadow"
        return f"with weight {self.weight}" if self.weight else "for who names it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbationRules:
    """What a version must show on a device before it takes the champion's place there.

    Attributes:
        seconds: How long it answers the champion's requests in the shadow; 0 for not at all. Without requests it has
            nothing to show and passes.
        min_agreement: Least share of the compared rows in which both agree, 0 to 1.
        max_latency_ratio: Most that its median latency may be of the champion's; None for any.
    """

    seconds: int = 0
    min_agreement: Decimal = Decimal(0)
    max_latency_ratio: Decimal | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seconds <= PROBATION_MAX_S:
            raise ValueError(f"seconds is {self.seconds}, must be in 0..{PROBATION_MAX_S}")
        if not self.min_agreement.is_finite() or not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement is {self.min_agreement}, must be in 0..1")
        if self.min_agreement and not self.seconds:
            raise ValueError("min_agreement is of live requests: it needs seconds")
        ratio = self.max_latency_ratio
        if ratio is not None and not (ratio.is_finite() and ratio >= 1):
            raise ValueError(f"max_latency_ratio is {ratio}, must be >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseTerms:
    """What a released version is for.

    Attributes:
        role: The alias it stands for; of offers before there were challengers it is not known.
        version: Its number.
        split: Of a challenger, and of nothing else.
        requirements: What a device must be to have it.
        wave: Which devices a champion is for by now; None for all. Another device stays with what it runs, if that is
            the champion or the previous version, and goes to the previous one otherwise.
        probation: What a champion must show first.
    """

    schema_version: Literal[1] = 1
    role: Role | None = None
    version: int
    split: Split | None = None
    requirements: Requirements = field(default_factory=Requirements)
    wave: Wave | None = None
    probation: ProbationRules = field(default_factory=ProbationRules)

    def __post_init__(self) -> None:
        if self.role != "champion" and self.wave is not None:
            raise ValueError(f"role is {self.role}: only a champion comes in waves")
        if (self.role == "challenger") != (self.split is not None):
            raise ValueError(f"role is {self.role}: a challenger has a split, and only a challenger")


def build_terms(terms: ReleaseTerms) -> dict[str, object]:
    """Return the `custom` that is signed, as it is read back; no floats, and nothing of what is as it is by default."""
    document, plain = (_build_plain(each) for each in (terms, ReleaseTerms(version=terms.version)))
    kept = {"schema_version", "version"}
    return {name: value for name, value in document.items() if name in kept or value != plain[name]}


def _build_plain(terms: ReleaseTerms) -> dict[str, object]:
    document: dict[str, object] = msgspec.json.decode(build_canonical(terms))
    return document


def parse_terms(custom: object) -> ReleaseTerms:
    """Return what a `custom` says; unknown fields are ignored; raises MalformedError."""
    try:
        return msgspec.convert(custom, ReleaseTerms)
    except (msgspec.MsgspecError, ValueError, ArithmeticError) as error:
        raise MalformedError(f"terms of a release: {error}") from error
