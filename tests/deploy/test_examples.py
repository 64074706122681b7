"""The example configurations name every key there is, with its true default, and load."""

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from edge_agent.config import AgentSettings, load_agent_settings
from fl_server.config import ServerSettings, load_server_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
EDGE, SERVER = DEPLOY / "edge/edge-agent.toml", DEPLOY / "server/fl-server.toml"
EXAMPLES = [(EDGE, AgentSettings, load_agent_settings), (SERVER, ServerSettings, load_server_settings)]
ids = pytest.mark.parametrize(("path", "kind", "load"), EXAMPLES, ids=["edge", "server"])


def list_keys(kind: type, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key; * stands for a section of any name."""
    for name, hint in get_type_hints(kind).items():
        inner = [hint, *get_args(hint)]
        sections = [each for each in inner if dataclasses.is_dataclass(each)]
        middle = (name, "*") if getattr(hint, "__origin__", None) is dict else (name,)
        if sections:
            yield from list_keys(sections[0], (*place, *middle))
        else:
            yield (*place, name)


def turn_on(path: Path) -> str:
    """Return the example with every line turned on that is off."""
    return re.sub(r"(?m)^#(?! )", "", path.read_text()).replace("consent = false", "consent = true")


def find(document: Any, key: tuple[str, ...]) -> bool:
    if not key:
        return True
    if key[0] == "*":
        return any(find(each, key[1:]) for each in document.values())
    return key[0] in document and find(document[key[0]], key[1:])


@ids
def test_every_key_is_in_the_example(path: Path, kind: type, load: Any) -> None:
    document = tomllib.loads(turn_on(path))
    assert [".".join(key) for key in list_keys(kind) if not find(document, key)] == []


@ids
def test_the_example_loads_with_every_line_turned_on(path: Path, kind: type, load: Any, tmp_path: Path) -> None:
    turned_on = tmp_path / path.name
    turned_on.write_text(turn_on(path))
    load(turned_on)


@ids
def test_the_values_of_the_example_are_the_defaults(path: Path, kind: type, load: Any) -> None:
    settings = load(path)
    required = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    assert settings == kind(**required)
