"""Configuration of a coordinator: `fl-server.toml`, environment variables `FL_SERVER_…` over it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from models.contract.manifest import Runtime
from models.contract.settings import SettingsError, load_settings
from models.contract.topics import check_name

CONFIG_NAME = "fl-server.toml"
PREFIX = "FL_SERVER"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """Where the MQTT broker listens, for the coordinator and for devices alike.

    Attributes:
        tls: Whether it asks for certificates.
        ca_path: The authority that the broker's certificate comes from, PEM; the federation's own where None.
        cert_path: The coordinator's certificate; that in the federation's `ca/` where None, and so is `key_path`.
        revocation_interval_s: After how long, at most, the broker learns of a device that was revoked.
    """

    host: str = "127.0.0.1"
    port: int = 8883
    tls: bool = True
    ca_path: Path | None = None
    cert_path: Path | None = None
    key_path: Path | None = None
    revocation_interval_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.tls and self.host not in LOOPBACK:
            raise ValueError(
                f"broker.tls is false and broker.host {self.host!r:.80}: without TLS a broker may only be on "
                f"{', '.join(LOOPBACK)}"
            )
        if (self.cert_path is None) != (self.key_path is None):
            raise ValueError("broker.cert_path and broker.key_path belong together")
        if not 0 < self.revocation_interval_s <= 30:  # two of them, and the connection, within a minute
            raise ValueError(f"broker.revocation_interval_s is {self.revocation_interval_s}, must be in (0, 30]")
        _check_address(self.host, self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinkSettings:
    """Where the coordinator starts Flower's SuperLink; devices reach it through the proxy."""

    host: str = "127.0.0.1"
    port: int = 9092

    def __post_init__(self) -> None:
        _check_address(self.host, self.port)
        if self.host not in LOOPBACK:
            raise ValueError(
                f"superlink.host is {self.host!r:.80}, must be one of {', '.join(LOOPBACK)}: its Control API asks nobody "
                "who they are, so devices come through the proxy; leave the key out, and name this machine in proxy.host"
            )

    @property
    def address(self) -> str:
        """Host and port, as this machine dials it."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """Where nginx listens for devices, as `proxy/nginx.conf` says, too.

    Attributes:
        used: Whether devices come through it; false for devices on this machine only, which dial the SuperLink.
        host: Where devices reach this machine.
        port: For devices with a certificate.
        enrolment_port: For devices that have only a token yet.
        coordinator_port: Where the coordinator takes enrolments and renewals from it, on the loopback.
    """

    used: bool = True
    host: str = "127.0.0.1"
    port: int = 9443
    enrolment_port: int = 9444
    coordinator_port: int = 9093

    def __post_init__(self) -> None:
        for port in (self.port, self.enrolment_port, self.coordinator_port):
            _check_address(self.host, port)
        if not self.used and self.host not in LOOPBACK:
            raise ValueError(
                f"proxy.used is false and proxy.host {self.host!r:.80}: without the proxy devices may only be on this "
                "machine"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsSettings:
    """How long rounds wait, and for how many.

    Attributes:
        deadline_s: Of one round, from its first message to its last accepted update.
        join_timeout_s: How long a run waits for the devices it woke.
        offline_grace_s: How long a round waits for a device that the broker lost; devices take up to 60 s to come back.
        quorum: Least share of the woken devices whose updates make a round; in (0, 1].
        idle_timeout_s: After how long without a message a device's training process ends.
        poll_budget_per_s: Requests a second that all training processes together may send.
    """

    deadline_s: float = 60.0
    join_timeout_s: float = 60.0
    offline_grace_s: float = 75.0
    quorum: float = 0.5
    idle_timeout_s: int = 60
    poll_budget_per_s: float = 40.0

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}, must be in (0, 1]")
        if min(self.deadline_s, self.join_timeout_s, self.offline_grace_s, self.poll_budget_per_s) <= 0:
            raise ValueError("deadline_s, join_timeout_s, offline_grace_s and poll_budget_per_s must be > 0")
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
    proxy: ProxySettings = field(default_factory=ProxySettings)
    rounds: RoundsSettings = field(default_factory=RoundsSettings)
    models: dict[str, ModelSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.fleet, "fleet")
        for name in self.models:
            check_name(name, "model")

    @property
    def fleet_address(self) -> str:
        """Host and port where devices find the SuperLink."""
        return f"{self.proxy.host}:{self.proxy.port}" if self.proxy.used else self.superlink.address


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
