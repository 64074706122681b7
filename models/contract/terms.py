"""The terms of a release: what the signed `custom` of its target says beside digest and size."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeAlias

import msgspec

from models.contract.errors import MalformedError

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
class ReleaseTerms:
    """What a released version is for.

    Attributes:
        role: The alias it stands for; of offers before there were challengers it is not known.
        version: Its number.
        split: Of a challenger, and of nothing else.
    """

    schema_version: Literal[1] = 1
    role: Role | None = None
    version: int
    split: Split | None = None

    def __post_init__(self) -> None:
        if (self.role == "challenger") != (self.split is not None):
            raise ValueError(f"role is {self.role}: a challenger has a split, and only a challenger")


def build_terms(terms: ReleaseTerms) -> dict[str, object]:
    """Return the `custom` that is signed; holds no floats."""
    document: dict[str, object] = msgspec.to_builtins(terms)
    return {name: value for name, value in document.items() if value is not None}


def parse_terms(custom: object) -> ReleaseTerms:
    """Return what a `custom` says; unknown fields are ignored; raises MalformedError."""
    try:
        return msgspec.convert(custom, ReleaseTerms)
    except (msgspec.MsgspecError, ValueError, ArithmeticError) as error:
        raise MalformedError(f"terms of a release: {error}") from error
