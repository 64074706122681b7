"""Configuration: a TOML file into a frozen dataclass, environment variables over it.

`PREFIX_SECTION__KEY=value` overrides `key` in `[section]`; relative paths are relative to the file.
"""

import dataclasses
import os
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from models.contract.errors import ContractError

_Settings = TypeVar("_Settings")


class SettingsError(ContractError):
    """The configuration cannot be used; the message names the file or the key."""


def load_settings(
    path: Path, kind: type[_Settings], *, prefix: str, environment: Mapping[str, str] = os.environ
) -> _Settings:
    """Return the settings of dataclass `kind` in the TOML file at `path`.

    Raises:
        SettingsError: Unreadable file, bad TOML, unknown or missing key, wrong type, value out of range.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    _override(document, kind, prefix, environment)
    _check_known(document, kind, str(path), "")
    try:
        return msgspec.convert(document, kind, dec_hook=lambda hint, value: _decode(hint, value, path.resolve().parent))
    except (msgspec.ValidationError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error


def _decode(hint: type, value: object, directory: Path) -> Any:
    if issubclass(hint, Path) and isinstance(value, str):
        return directory / value
    raise ValueError(f"expected {hint.__name__}, got {value!r}")


def _override(document: dict[str, Any], kind: type, prefix: str, environment: Mapping[str, str]) -> None:
    for name, text in environment.items():
        if not name.startswith(f"{prefix}_"):
            continue
        *sections, key = name.removeprefix(f"{prefix}_").lower().split("__")
        table, hints = document, get_type_hints(kind)
        for section in sections:
            if not dataclasses.is_dataclass(hints.get(section)):
                raise SettingsError(f"environment variable {name}: there is no section [{section}]")
            hints = get_type_hints(hints[section])
            table = table.setdefault(section, {})
        if key not in hints:
            raise SettingsError(f"environment variable {name}: there is no key {key!r}")
        table[key] = _convert_text(text, hints[key], name)


def _convert_text(text: str, hint: Any, name: str) -> Any:
    wanted = {hint, *get_args(hint)}
    if bool in wanted:
        if text.lower() not in ("true", "false"):
            raise SettingsError(f"environment variable {name}: {text!r} is neither true nor false")
        return text.lower() == "true"
    for number in (int, float):
        if number in wanted:
            try:
                return number(text)
            except ValueError as error:
                raise SettingsError(f"environment variable {name}: {text!r} is no {number.__name__}") from error
    return text


def _check_known(table: Mapping[str, Any], kind: type, file: str, where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            raise SettingsError(f"{file}: unknown key {where + key!r}; known here: {', '.join(sorted(hints))}")
        for section in _sections(hints[key]):
            if isinstance(value, dict) and get_origin(hints[key]) is dict:
                for name, inner in value.items():
                    if isinstance(inner, dict):
                        _check_known(inner, section, file, f"{where}{key}.{name}.")
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, dict) and get_origin(hints[key]) is not dict:
                    _check_known(inner, section, file, f"{where}{key}.")


def _sections(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    if get_origin(hint) in (dict, tuple, types.UnionType):
        return [section for argument in get_args(hint) for section in _sections(argument)]
    return []
