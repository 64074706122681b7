"""What the owner takes out of a row before anything is made of it: fields dropped, hashed or coarsened."""

import datetime as dt
import hmac
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_agent.config import FieldRule
from edge_agent.errors import StalledError
from models.contract.files import save_atomically
from models.tensors.features import build_text, is_missing, parse_number

KEY_BYTES = 32
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


def load_key(path: Path) -> bytes:
    """Return the secret at `path`, made there if there is none, readable by its owner only.

    Raises:
        StalledError: Unreadable or damaged: another key would silently make other hashes of the same values.
    """
    try:
        if not path.exists():
            save_atomically(path, os.urandom(KEY_BYTES), mode=0o600)
        key = path.read_bytes()
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror or error}") from error
    if len(key) != KEY_BYTES:
        raise StalledError(f"{path}: {len(key)} bytes, expected a key of {KEY_BYTES}; remove it to make another")
    return key


def _coarsen_date(value: Any, period: str) -> str:
    try:
        date = dt.datetime.fromisoformat(build_text(value))
    except ValueError:
        raise ValueError("expected a date such as 2026-11-24") from None
    if period == "week":
        return "{}-W{:02}".format(*date.isocalendar())
    return date.strftime({"year": "%Y", "month": "%Y-%m", "day": "%Y-%m-%d"}[period])
