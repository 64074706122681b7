"""Configuration: TOML and environment into a dataclass, and every mistake named in one line."""

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

from models.contract.settings import SettingsError, load_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    host: str = "127.0.0.1"
    port: int = 8080
    key_path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    name: str
    limit: Decimal = Decimal(8)
    state_dir: Path = Path("state")
    quick: bool = False
    http: Door = field(default_factory=Door)
    doors: dict[str, Door] = field(default_factory=dict)
    spare: Door | None = None


def load(tmp_path: Path, text: str, **environment: str) -> Settings:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return load_settings(path, Settings, prefix="EDGE", environment=environment)


def test_paths_are_relative_to_the_file_and_the_environment_wins(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        'name = "a"\nlimit = "3.5"\nstate_dir = "s"\n[http]\nport = 1\nkey_path = "k.pem"\n[doors.side]\nport = 2\n',
        EDGE_HTTP__PORT="99",
        EDGE_QUICK="true",
        OTHER="x",
    )
    assert settings.http == Door(port=99, key_path=tmp_path / "k.pem")
    assert settings.doors == {"side": Door(port=2)}
    assert (settings.limit, settings.state_dir, settings.quick) == (Decimal("3.5"), tmp_path / "s", True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('name = "a"\nnmae = 1', "'nmae'"),
        ('name = "a"\n[http]\nprot = 1', "'http.prot'"),
        ('name = "a"\n[doors.x]\nprot = 1', "'doors.x.prot'"),
        ('name = "a"\n[spare]\nprot = 1', "'spare.prot'"),
        ("name = 1", "name"),
        ("", "name"),
        ('name = "a"\n[http]\nport = "x"', "port"),
        ("name = ", "x.toml"),
        ('name = "a"\nstate_dir = 3', "state_dir"),
    ],
)
def test_every_mistake_is_named_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment", [{"EDGE_PROT": "1"}, {"EDGE_X__PORT": "1"}, {"EDGE_HTTP__PORT": "x"}, {"EDGE_QUICK": "maybe"}]
)
def test_a_wrong_environment_variable_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(environment))):
        load(tmp_path, 'name = "a"', **environment)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml"):
        load_settings(tmp_path / "none.toml", Settings, prefix="EDGE", environment={})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"binary\.toml"):
        load_settings(tmp_path / "binary.toml", Settings, prefix="EDGE", environment={})
