"""Raw rows into a model's inputs: one function for training, evaluation and serving; pure.

A raw row holds numbers, bools or text by the names of its columns, as CSV, JSON and Parquet give them. Every
constant comes from the definition of the model, none from a device's data.

    raw value -impute-> -clip-> -scale-> number
                `-> one_hot | hash | tokenise -> numbers
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from models.tensors.spec import TensorSpec

Array: TypeAlias = npt.NDArray[Any]
Row: TypeAlias = Mapping[str, object]

WORDS_MAX_BYTES = 32 * 1024  # half of what a manifest may be
COLUMNS_MAX = 65_536  # of one feature; bounds what a manifest can make a device allocate for a row
_WORD = re.compile(r"\w+")
_FIRST_WORD_ID = 2  # after padding and unknown


class RowError(ValueError):
    """A raw row that cannot become an input; `row` is its place in what was given, from 0."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Text into a fixed number of word ids: 0 for padding, 1 for an unknown word, then the known ones.

    Words are runs of letters, digits and underscores, in lower case. Text with more of them is cut off.

    Attributes:
        length: Ids of one text.
        words: The known words, in the order of their ids; or
        buckets: how many ids all words are hashed to, none of which is unknown then.
    """

    length: int
    words: tuple[str, ...] = ()
    buckets: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= COLUMNS_MAX:
            raise ValueError(f"tokenise: length is {self.length}, must be in 1..{COLUMNS_MAX}")
        if bool(self.words) == bool(self.buckets) or self.buckets < 0:
            raise ValueError("tokenise: expected either words or buckets >= 1")
        if len(set(self.words)) != len(self.words) or any(_WORD.findall(word.lower()) != [word] for word in self.words):
            raise ValueError("tokenise: words must be single words in lower case, each once")
        if sum(len(word.encode()) + len('"",') for word in self.words) > WORDS_MAX_BYTES:
            raise ValueError(f"tokenise: words take more than {WORDS_MAX_BYTES} bytes of the manifest; use buckets")

    @property
    def size(self) -> int:
        """How many ids there are: the rows of the model's embedding."""
        return _FIRST_WORD_ID + (len(self.words) or self.buckets)


@dataclass(frozen=True, slots=True)
class Feature:
    """How one column of raw rows becomes columns of the input; a number as it is, if nothing else is said.

    Attributes:
        column: Its name in raw rows.
        impute: Raw value that stands for a missing one (no such column, empty, null, NaN); None refuses the row.
        clip: Least and largest number; what is beyond becomes them.
        scale: Centre and spread: the number minus the one, divided by the other.
        one_hot: The known categories, a column each; an unknown one is 0 in all of them.
        hash: Number of columns; 1 in the one to which the text is hashed, 0 in the others.
        tokenise: Text into ids, for a model whose input are integers.
    """

    column: str
    impute: str | None = field(default=None, kw_only=True)
    clip: tuple[Decimal, Decimal] | None = field(default=None, kw_only=True)
    scale: tuple[Decimal, Decimal] | None = field(default=None, kw_only=True)
    one_hot: tuple[str, ...] = field(default=(), kw_only=True)
    hash: int = field(default=0, kw_only=True)
    tokenise: Tokens | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("clip", "scale"):  # definitions say 0.5, manifests "0.5"
            if (pair := getattr(self, name)) is not None:
                object.__setattr__(self, name, _to_decimals(pair, f"feature {self.column!r}: {name}"))
        impute: object = self.impute
        if impute is not None:
            object.__setattr__(self, "impute", build_text(impute))
        self._check()

    @property
    def width(self) -> int:
        """How many columns of the input it fills."""
        if self.tokenise is not None:
            return self.tokenise.length
        return len(self.one_hot) or self.hash or 1

    @property
    def is_number(self) -> bool:
        return not (self.one_hot or self.hash or self.tokenise)

    def _check(self) -> None:
        where = f"feature {self.column!r}"
        if not self.column:
            raise ValueError("a feature must name its column")
        if sum((bool(self.one_hot), bool(self.hash), self.tokenise is not None)) > 1:
            raise ValueError(f"{where}: only one of one_hot, hash and tokenise can be")
        if not self.is_number and (self.clip or self.scale):
            raise ValueError(f"{where}: clip and scale are for numbers")
        if self.clip and self.clip[0] > self.clip[1]:
            raise ValueError(f"{where}: clip must be (least, largest)")
        if self.scale and self.scale[1] == 0:
            raise ValueError(f"{where}: scale must be (centre, spread), the spread not 0")
        if len(set(self.one_hot)) != len(self.one_hot) or any(name != build_text(name) for name in self.one_hot):
            raise ValueError(f"{where}: one_hot must be texts without blanks around them, each once")
        if not 0 <= self.hash <= COLUMNS_MAX or len(self.one_hot) > COLUMNS_MAX:
            raise ValueError(f"{where}: at most {COLUMNS_MAX} columns")
        if self.impute is not None and self.is_number:
            parse_number(self.impute)
        if self.impute is not None and self.one_hot and self.impute not in self.one_hot:
            raise ValueError(f"{where}: impute {self.impute!r} is none of its categories")


def check_features(features: Sequence[Feature], inputs: Sequence[TensorSpec]) -> None:
    """Raise ValueError unless `features` fill the only one of `inputs`."""
    if not features:
        return
    width = sum(feature.width for feature in features)
    if len(inputs) != 1 or inputs[0].row_shape != (width,):
        shapes = ", ".join(f"{spec.name!r} of shape {spec.shape}" for spec in inputs)
        raise ValueError(f"features fill one input of shape ('batch', {width}), found {shapes}")
    if inputs[0].numpy_dtype.kind not in "fiu":
        raise ValueError(f"features fill an input of numbers, {inputs[0].name!r} is {inputs[0].dtype}")
    if inputs[0].numpy_dtype.kind == "f" and any(feature.tokenise for feature in features):
        raise ValueError(f"tokenise makes integers, input {inputs[0].name!r} is {inputs[0].dtype}")


def build_inputs(features: Sequence[Feature], inputs: Sequence[TensorSpec], rows: Sequence[object]) -> dict[str, Array]:
    """Return `rows` as the tensors of a model, each of shape (len(rows), *row shape) and its dtype.

    A row's tensors do not depend on the rows beside it.

    Args:
        features: What the model declares. Without them a row holds its numbers in the order of its columns, or
            each tensor under its name.
        inputs: The model's.
        rows: Mappings by column; or, for a model of one input, nested lists as the tensor holds them.

    Raises:
        RowError: A value that is missing or of no use; it names the column.
    """
    if not features:
        return {spec.name: _stack(rows, spec, len(inputs)) for spec in inputs}
    by_name: list[Row] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise RowError(number, "expected values by the names of their columns, as the model declares features")
        by_name.append(row)
    blocks = [_build_block(feature, by_name) for feature in features]
    return {inputs[0].name: _cast(np.concatenate(blocks, axis=1), inputs[0])}


def is_missing(value: object) -> bool:
    """Return whether `value` says that there is none: null, NaN, or text of blanks only."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())  # noqa: PLR0124 - NaN


def parse_number(value: object) -> int | float:
    """Return a number, a bool (1 or 0) or the text of either as a finite number; raises ValueError."""
    if isinstance(value, str):
        value = _parse_number_text(value.strip())
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float) and abs(value) <= 1.7976931348623157e308:
        return value
    raise ValueError("expected a finite number")


def build_text(value: object) -> str:
    """Return the text of a category: bools as true and false, whole numbers without a fraction, text without its rim.

    Raises:
        ValueError: Not text, a number or a bool.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float):
        return str(value)
    raise ValueError("expected text, a number or a bool")


def _build_block(feature: Feature, rows: Sequence[Row]) -> Array:
    """Return one feature's columns, shape (rows, width)."""
    build = _choose(feature)
    values = []
    for number, row in enumerate(rows):
        value = row.get(feature.column)
        if is_missing(value):
            if feature.impute is None:
                raise RowError(number, f"column {feature.column!r} is missing")
            value = feature.impute
        try:
            values.append(build(value))
        except (ValueError, OverflowError) as error:
            raise RowError(number, f"column {feature.column!r}: {error}") from error
    if not feature.is_number:
        return np.array(values, np.int64).reshape(len(rows), feature.width)
    column = np.array(values, np.float64)
    if feature.clip:
        column = np.clip(column, float(feature.clip[0]), float(feature.clip[1]))
    if feature.scale:
        with np.errstate(over="ignore"):  # what is not finite is refused with the row's number
            column = (column - float(feature.scale[0])) / float(feature.scale[1])
    return column[:, None]


def _choose(feature: Feature) -> Callable[[object], Any]:
    if feature.tokenise is not None:
        tokens = feature.tokenise
        ids = {word: number for number, word in enumerate(tokens.words, _FIRST_WORD_ID)}
        return lambda value: _find_ids(build_text(value), tokens, ids)
    if feature.one_hot:
        return lambda value: _build_one_hot(feature.one_hot, build_text(value))
    if feature.hash:
        return lambda value: _mark(_hash(build_text(value), feature.hash), feature.hash)
    return lambda value: float(parse_number(value))


def _find_ids(text: str, tokens: Tokens, ids: Mapping[str, int]) -> list[int]:
    words = islice((match.group() for match in _WORD.finditer(text.lower())), tokens.length)
    if tokens.buckets:
        found = [_FIRST_WORD_ID + _hash(word, tokens.buckets) for word in words]
    else:
        found = [ids.get(word, 1) for word in words]
    return found + [0] * (tokens.length - len(found))


def _build_one_hot(categories: Sequence[str], text: str) -> list[int]:
    return [int(text == category) for category in categories]


def _mark(place: int, width: int) -> list[int]:
    marks = [0] * width
    marks[place] = 1
    return marks


def _hash(text: str, buckets: int) -> int:
    """Return the bucket of `text`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % buckets


def _stack(rows: Sequence[object], spec: TensorSpec, inputs: int) -> Array:
    """Return what `rows` hold for `spec`; each is cast alone, since stacking would widen it to its neighbours' dtype."""
    stacked = np.zeros((len(rows), *spec.row_shape), spec.numpy_dtype)
    for number, row in enumerate(rows):
        value: Any = row
        if isinstance(row, Mapping):
            if spec.name not in row and inputs > 1:
                raise RowError(number, f"input {spec.name!r} is missing")
            value = row.get(spec.name, list(row.values()))
        elif inputs > 1:
            raise RowError(number, "expected the inputs by their names")
        try:
            array = _build_array(value, spec)
        except (ValueError, OverflowError) as error:
            raise RowError(number, f"input {spec.name!r}: {error}") from error
        stacked[number] = _cast(array[None], spec, number)[0]
    return stacked


def _build_array(value: Any, spec: TensorSpec) -> Array:
    array = value if isinstance(value, np.ndarray) else np.array(_parse_nested(value, is_text=spec.dtype == "string"))
    if spec.dtype == "string":
        array = array.astype(object)
    elif array.dtype.kind not in "fiub":
        raise ValueError("expected finite numbers within 64 bits")
    if array.shape == spec.row_shape or (array.ndim <= 1 and array.size == math.prod(spec.row_shape)):
        return array.reshape(spec.row_shape)
    raise ValueError(f"expected values of shape {spec.row_shape}, got {array.shape}")


def _parse_nested(value: Any, *, is_text: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_parse_nested(item, is_text=is_text) for item in value]
    return build_text(value) if is_text else parse_number(value)


def _cast(array: Array, spec: TensorSpec, first_row: int = 0) -> Array:
    """Return `array`, rows from `first_row`, in the dtype of `spec`, if its values survive the change."""
    dtype = spec.numpy_dtype
    if dtype.kind == "O":
        return array
    with np.errstate(invalid="ignore", over="ignore"):  # what does not survive is found below
        converted = array.astype(dtype)
    survived = np.isfinite(converted) if dtype.kind == "f" else converted == array
    fits = survived.reshape(len(array), -1).all(axis=1)
    if not fits.all():
        raise RowError(first_row + int(np.argmin(fits)), f"input {spec.name!r}: a value is no finite {spec.dtype}")
    return converted


def _parse_number_text(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not text.isascii() or "_" in text:  # which float() would take
        return None
    try:
        return int(text) if len(text) < 20 and text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return None


def _to_decimals(pair: Sequence[object], where: str) -> tuple[Decimal, Decimal]:
    try:
        first, second = (Decimal(str(number)) for number in pair)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected two numbers") from error
    if not (first.is_finite() and second.is_finite()):
        raise ValueError(f"{where}: expected two finite numbers")
    return first, second
