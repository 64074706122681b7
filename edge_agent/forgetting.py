"""Which samples an owner means who says `column=value`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from edge_agent.errors import RequestError
from edge_agent.samples.feedback import parse_target
from edge_agent.samples.fields import FieldRules
from edge_agent.samples.sealing import Array, Opened
from models.contract.manifest import ModelManifest
from models.tensors.features import RowError, build_inputs, build_text
from models.tensors.spec import TensorSpec

TARGET = "y"
_DECIMAL = re.compile(r"-?[0-9]+\.[0-9]*")

_Test: TypeAlias = Callable[[Opened], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What has become of the owner's wish.

    Attributes:
        forgotten: Samples that are gone.
        waiting: Answered requests that no longer wait for their truth.
        kept: Samples that are left; None if their file cannot be opened.
    """

    forgotten: int
    waiting: int
    kept: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which samples to forget; those of which every test holds.

    Attributes:
        is_meant: Of a sample.
        may_be_meant: Of the inputs of a request without its truth: true where nobody can tell.
    """

    is_meant: _Test
    may_be_meant: Callable[[Array], bool]


def build_wish(
    where: Mapping[str, Any], *, manifest: ModelManifest | None, rules: FieldRules, forget_by: Sequence[str]
) -> Wish:
    """Return what `where` means: the target, columns that are kept for this, columns of the model's features.

    Of a feature's column, every sample is meant that the model cannot tell from one with this value.

    Raises:
        RequestError: A column by which nothing can be found, or a value that it cannot have.
    """
    tests: list[_Test] = []
    inputs: list[Callable[[Array], bool]] = []
    for column, value in where.items():
        if column == TARGET:
            tests.append(_build_target_test(value, manifest))
            continue
        ruled = _apply(rules, column, value)
        is_alike = _build_feature_test(column, ruled, manifest)
        if column not in forget_by and is_alike is None:
            raise RequestError(
                f"column {column!r:.80}: samples are found by {TARGET}, columns of the model's features and "
                "columns in samples.forget_by"
            )
        tests.append(partial(_matches_column, column, _build_text(column, ruled), is_alike))
        if is_alike is not None:
            inputs.append(is_alike)
    return Wish(
        is_meant=lambda opened: all(test(opened) for test in tests),
        may_be_meant=lambda x: all(test(x) for test in inputs),
    )


def build_fields(row: Mapping[str, Any], rules: FieldRules, forget_by: Sequence[str]) -> dict[str, str]:
    """Return the values of `row`, by the owner's rules, by which it can be found later."""
    ruled = rules.apply({column: row[column] for column in forget_by if row.get(column) is not None})
    return {column: _build_text(column, value) for column, value in ruled.items()}


def _matches_column(column: str, text: str, is_alike: Callable[[Array], bool] | None, opened: Opened) -> bool:
    fields = opened.parse_fields()
    if column in fields:
        return fields[column] == text
    return is_alike is not None and is_alike(opened.parse_sample()[0])


def _build_target_test(value: Any, manifest: ModelManifest | None) -> _Test:
    expected = parse_target(value, 1, spec=None, labels=manifest.labels if manifest else ())[0]
    return lambda opened: np.array_equal(opened.parse_sample()[1], expected)


def _build_feature_test(column: str, value: Any, manifest: ModelManifest | None) -> Callable[[Array], bool] | None:
    start = 0
    for feature in manifest.features if manifest else ():
        end = start + feature.width
        if feature.column == column:
            assert manifest is not None
            spec = TensorSpec(manifest.inputs[0].name, ("batch", feature.width), manifest.inputs[0].dtype)
            try:
                expected = build_inputs((feature,), (spec,), [{column: value}])[spec.name][0]
            except RowError as error:
                raise RequestError(str(error)) from error
            return partial(_has_part, manifest.inputs[0].row_shape, slice(start, end), expected)
        start = end
    return None


def _has_part(shape: tuple[int, ...], part: slice, expected: Array, x: Array) -> bool:
    return x.shape == shape and np.array_equal(x[part], expected)


def _apply(rules: FieldRules, column: str, value: Any) -> Any:
    try:
        ruled = rules.apply({column: value})
    except ValueError as error:
        raise RequestError(str(error)) from error
    if column not in ruled:
        raise RequestError(f"column {column!r:.80} is dropped before anything is kept: no sample can be found by it")
    return ruled[column]


def _build_text(column: str, value: Any) -> str:
    """Return the one text of a value, so that 54, 54.0 and "54.0" are alike."""
    try:
        text = build_text(value)
    except ValueError as error:
        raise RequestError(f"column {column!r:.80}: {error}") from error
    return text.rstrip("0").rstrip(".") if _DECIMAL.fullmatch(text) else text
