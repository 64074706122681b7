"""What the owner takes out of a row before anything is made of it: fields dropped, hashed or coarsened."""

import datetime as dt
import hmac
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.config import FieldRule
from models.tensors.features import build_text, is_missing, parse_number

_HASH_DIGITS = 32  # 128 bits: no two values of a device meet by chance


class FieldRules:
    """Rules by column; a value that is missing stays missing."""

    def __init__(self, rules: Mapping[str, FieldRule], load_key: Callable[[], bytes]) -> None:
        """Prepare.

        Args:
            rules: By column.
            load_key: Gives the device's own secret; asked on the first value that is hashed.
        """
        self._rules = rules
        self._load_key = load_key
        self._key = b""

    def __bool__(self) -> bool:
        return bool(self._rules)

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return `row` as it may be used.

        Raises:
            ValueError: A value to which its rule cannot be applied; the message names the column, not the value.
            StalledError: The device's key cannot be read.
        """
        kept = {}
        for column, value in row.items():
            rule = self._rules.get(column)
            if rule is None or (is_missing(value) and not rule.drop):
                kept[column] = value
            elif not rule.drop:
                try:
                    kept[column] = self._change(column, value, rule)
                except (ValueError, OverflowError) as error:
                    raise ValueError(f"column {column!r}: {error}") from None  # its cause may quote the value
        return kept

    def _change(self, column: str, value: Any, rule: FieldRule) -> Any:
        if rule.step is not None:
            return float(round(parse_number(value) / float(rule.step)) * rule.step)
        if rule.period is not None:
            return _coarsen_date(value, rule.period)
        self._key = self._key or self._load_key()
        message = f"{column}\0{build_text(value)}".encode()
        return hmac.digest(self._key, message, "sha256").hex()[:_HASH_DIGITS]


def _coarsen_date(value: Any, period: str) -> str:
    try:
        date = dt.datetime.fromisoformat(build_text(value))
    except ValueError:
        raise ValueError("expected a date such as 2026-11-24") from None
    if period == "week":
        return "{}-W{:02}".format(*date.isocalendar())
    return date.strftime({"year": "%Y", "month": "%Y-%m", "day": "%Y-%m-%d"}[period])
