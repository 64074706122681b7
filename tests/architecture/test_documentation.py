"""What users can type, set or subscribe to stands in a README, and README commands are the ones CI runs."""

import argparse
import dataclasses
from pathlib import Path

import pytest

import edge_agent.__main__
import fl_server.__main__
from edge_agent.config import AgentSettings
from fl_server.config import ModelSettings, ServerSettings
from models.contract import asyncapi, topics

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def list_commands(parser: argparse.ArgumentParser) -> list[str]:
    (choices,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return sorted(choices)


def list_keys(kind: type) -> list[str]:
    keys = []
    for field in dataclasses.fields(kind):
        kinds = [field.type, *getattr(field.type, "__args__", ())]
        sections = [inner for inner in kinds if dataclasses.is_dataclass(inner)]
        keys += [key for section in sections for key in list_keys(section)] if sections else [field.name]
    return keys


@pytest.mark.parametrize("command", list_commands(fl_server.__main__.build_parser()))
def test_every_command_of_the_coordinator_is_in_the_readme_and_has_help(command: str) -> None:
    assert command in README
    assert_help(fl_server.__main__.build_parser(), command)


@pytest.mark.parametrize("command", list_commands(edge_agent.__main__.build_parser()))
def test_every_command_of_the_agent_is_in_the_readme_and_has_help(command: str) -> None:
    assert command in README
    assert_help(edge_agent.__main__.build_parser(), command)


@pytest.mark.parametrize("key", list_keys(AgentSettings))
def test_every_key_of_a_device_is_documented(key: str) -> None:
    assert (
        f"`{key}`" in (ROOT / "edge_agent/README.md").read_text()
        or f"] {key}`" in (ROOT / "edge_agent/README.md").read_text()
    )


@pytest.mark.parametrize("key", [*list_keys(ServerSettings), *list_keys(ModelSettings)])
def test_every_key_of_the_coordinator_is_documented(key: str) -> None:
    text = (ROOT / "fl_server/README.md").read_text()
    assert f"`{key}`" in text or f"] {key}`" in text or key == "models"


def test_every_topic_is_documented() -> None:
    text = (ROOT / "models/README.md").read_text()
    for channel in asyncapi.build_asyncapi()["channels"].values():
        assert f"`{channel['address']}`" in text
    assert topics.PREFIX in text


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert "make test" in lines
    assert "make check" in lines
    assert "make test" in README


def assert_help(parser: argparse.ArgumentParser, command: str) -> None:
    (choices,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert choices[command].description
    assert all(action.help for action in choices[command]._actions)
