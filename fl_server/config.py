"""Configuration of a coordinator: `fl-server.toml`, environment variables `FL_SERVER_…` over it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from models.contract.manifest import Runtime
from models.contract.settings import SettingsError, load_settings
from models.contract.topics import check_name

CONFIG_NAME = "fl-server.toml"
PREFIX = "FL_SERVER"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """Where the MQTT broker listens, for the coordinator and for devices alike."""

    host: str = "127.0.0.1"
    port: int = 1883

    def __post_init__(self) -> None:
        _check_address(self.host, self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinkSettings:
    """Where the coordinator starts Flower's SuperLink, and where devices find it."""

    host: str = "127.0.0.1"
    port: int = 9092

    def __post_init__(self) -> None:
        _check_address(self.host, self.port)

    @property
    def address(self) -> str:
        """Host and port, as devices dial it."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsSettings:
    """How long rounds wait, and for how many.

    Attributes:
        deadline_s: Of one round, from its first message to its last accepted update.
        join_timeout_s: How long a run waits for the devices it woke.
        quorum: Least share of the woken devices whose updates make a round; in (0, 1].
        idle_timeout_s: After how long without a message a device's training process ends.
        poll_budget_per_s: Requests a second that all training processes together may send.
    """

    deadline_s: float = 60.0
    join_timeout_s: float = 60.0
    quorum: float = 0.5
    idle_timeout_s: int = 60
    poll_budget_per_s: float = 40.0

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}, must be in (0, 1]")
        if min(self.deadline_s, self.join_timeout_s, self.poll_budget_per_s) <= 0:
            raise ValueError("deadline_s, join_timeout_s and poll_budget_per_s must be > 0")
        if not 1 <= self.idle_timeout_s <= 86_400:
            raise ValueError(f"idle_timeout_s is {self.idle_timeout_s}, must be in 1..86400")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One model of the federation.

    Attributes:
        definition: "FILE.py:NAME" or "package.module:NAME" of a ModelDefinition.
        validation: The server's own held-out data, an npz of x and y; the gate measures on it.
        calibration: An npz of x for the quantization ranges; the validation data's x without it.
        runtime: What the devices serve its versions with; "tflite" needs the extra `export-tflite`.
    """

    definition: str
    validation: Path
    calibration: Path | None = None
    runtime: Runtime = "onnx"

    def __post_init__(self) -> None:
        if ":" not in self.definition:
            raise ValueError(f"definition {self.definition!r} must read FILE.py:NAME or package.module:NAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """A coordinator: its fleet, its links and its models."""

    fleet: str
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    superlink: SuperLinkSettings = field(default_factory=SuperLinkSettings)
    rounds: RoundsSettings = field(default_factory=RoundsSettings)
    models: dict[str, ModelSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.fleet, "fleet")
        for name in self.models:
            check_name(name, "model")


def load_server_settings(path: Path) -> ServerSettings:
    """Return the settings in the file at `path`; a definition's file is relative to it.

    Raises:
        SettingsError: The file cannot be used; the message names it and the key.
    """
    return load_settings(path, ServerSettings, prefix=PREFIX)


def resolve_definition(settings: ServerSettings, model: str, directory: Path) -> str:
    """Return where `model` is defined, with the path of a file made absolute.

    Raises:
        SettingsError: The configuration has no section for `model`.
    """
    if model not in settings.models:
        known = ", ".join(sorted(settings.models)) or "none"
        raise SettingsError(f"{directory / CONFIG_NAME}: no section [models.{model}]; models here: {known}")
    source, name = settings.models[model].definition.rsplit(":", 1)
    return f"{directory / source}:{name}" if source.endswith(".py") else f"{source}:{name}"


def find_missing(settings: ServerSettings, model: str, directory: Path) -> list[str]:
    """Return the keys of `model` that name a file which cannot be read, each with its file."""
    section = settings.models[model]
    source = resolve_definition(settings, model, directory).rsplit(":", 1)[0]
    named = {"validation": section.validation, "calibration": section.calibration}
    if source.endswith(".py"):
        named["definition"] = Path(source)
    return [
        f"models.{model}.{key}: {path}"
        for key, path in named.items()
        if path and not (path.is_file() and os.access(path, os.R_OK))
    ]


def _check_address(host: str, port: int) -> None:
    if not host:
        raise ValueError("host is empty")
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}, must be in 1..65535")
