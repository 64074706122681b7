"""What the owner takes out of a row is gone before anything is made of it."""

from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.config import FieldRule
from edge_agent.errors import StalledError
from edge_agent.samples.fields import FieldRules
from edge_agent.samples.keys import load_key

KEY = bytes(32)


def build(**rules: FieldRule) -> FieldRules:
    return FieldRules(rules, lambda: KEY)


def test_dropped_field_is_gone_and_others_stay() -> None:
    assert build(a=FieldRule(drop=True)).apply({"a": 1, "b": 2}) == {"b": 2}


def test_hashed_field_is_the_same_for_the_same_value_of_the_same_column_and_device_only() -> None:
    rules = build(a=FieldRule(hash=True), b=FieldRule(hash=True))
    row = rules.apply({"a": "Hill Road 7", "b": "Hill Road 7"})
    assert row == rules.apply({"a": " Hill Road 7", "b": "Hill Road 7"})
    assert row["a"] != row["b"]
    assert len(row["a"]) == 32
    elsewhere = FieldRules({"a": FieldRule(hash=True)}, lambda: b"x" * 32)
    assert elsewhere.apply({"a": "Hill Road 7"})["a"] != row["a"]


@pytest.mark.parametrize(
    ("step", "value", "coarse"),
    [("5", 42, 40.0), ("5", "43", 45.0), ("0.1", 0.34, 0.3), ("0.1", -0.34, -0.3), ("10", True, 0.0)],
)
def test_number_is_rounded_to_a_step(step: str, value: object, coarse: float) -> None:
    assert build(a=FieldRule(step=Decimal(step))).apply({"a": value}) == {"a": coarse}


@pytest.mark.parametrize(
    ("period", "coarse"), [("year", "2026"), ("month", "2026-11"), ("week", "2026-W48"), ("day", "2026-11-24")]
)
def test_date_is_cut_down_to_its_period(period: str, coarse: str) -> None:
    rules = build(a=FieldRule(period=period))
    assert rules.apply({"a": "2026-11-24"}) == rules.apply({"a": "2026-11-24T10:11:12+01:00"}) == {"a": coarse}


@pytest.mark.parametrize("value", [None, "", float("nan")])
@pytest.mark.parametrize("rule", [FieldRule(hash=True), FieldRule(step=Decimal(1)), FieldRule(period="day")])
def test_missing_value_stays_missing(rule: FieldRule, value: object) -> None:
    (kept,) = build(a=rule).apply({"a": value}).values()
    assert kept is value


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (FieldRule(step=Decimal(1)), "secret"),
        (FieldRule(step=Decimal("1e-300")), 1e300),
        (FieldRule(period="day"), "secret"),
        (FieldRule(hash=True), ["secret"]),
        (FieldRule(hash=True), "secret\ud800"),
    ],
)
def test_value_without_sense_is_refused_and_not_repeated(rule: FieldRule, value: object) -> None:
    with pytest.raises(ValueError, match="column 'a'") as refused:
        build(a=rule).apply({"a": value})
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "fields.key"
    key = load_key(path)
    assert load_key(path) == key
    assert len(set(key)) > 1
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_or_unreadable_key_is_refused_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "fields.key").write_bytes(b"short")
    with pytest.raises(StalledError, match="5 bytes, expected a key of 32"):
        load_key(tmp_path / "fields.key")
    assert (tmp_path / "fields.key").read_bytes() == b"short"
    with pytest.raises(StalledError, match="no"):
        load_key(tmp_path / "no" / "fields.key")


def test_key_is_not_made_before_a_value_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "fields.key"
    rules = FieldRules({"a": FieldRule(hash=True)}, lambda: load_key(path))
    rules.apply({"a": None, "b": 1})
    assert not path.exists()
    rules.apply({"a": "x"})
    assert path.exists()
