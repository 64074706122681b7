"""What an agent is told: a TOML file, environment variables `EDGE_AGENT_SECTION__KEY` over it."""

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal

from models.contract.identity import Identity
from models.contract.settings import load_settings
from models.contract.topics import PREFIX, check_name

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """The local inference API.

    Attributes:
        host: Address to listen on; also accepted in the `Host` header.
        uds: Unix socket; None means `agent.sock` in the state directory.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    uds: Path | None = None

    def __post_init__(self) -> None:
        _check_port(self.port, "http.port")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """The same API over gRPC."""

    host: str = "127.0.0.1"
    port: int = 8001

    def __post_init__(self) -> None:
        _check_port(self.port, "grpc.port")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """The MQTT 5 broker of the fleet.

    Attributes:
        tls: Whether it is spoken to over TLS with the device's identity; None where there is one.
    """

    host: str = "127.0.0.1"
    port: int = 8883
    keepalive_s: int = 30
    tls: bool | None = None

    def __post_init__(self) -> None:
        _check_port(self.port, "broker.port")
        if not 5 <= self.keepalive_s <= 3600:
            raise ValueError(f"broker.keepalive_s is {self.keepalive_s}, must be in 5..3600")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """How releases are fetched.

    Attributes:
        deadline_s: For the whole fetch of one release, however many files it has.
        window: Chunks asked for at once.
    """

    deadline_s: float = 120.0
    window: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.deadline_s <= 86_400:
            raise ValueError(f"updates.deadline_s is {self.deadline_s}, must be in 1..86400")
        if not 1 <= self.window <= 64:
            raise ValueError(f"updates.window is {self.window}, must be in 1..64")


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationSettings:
    """Where and as whom the device trains.

    Attributes:
        ca_path: Certificate authority of the SuperLink, PEM; None for that of [identity].
        definition: `FILE.py:NAME` of the model's definition, the owner's own code, which the training process runs for
            a version that trains with the Opacus engine; None refuses to train such a version.
    """

    superlink: str
    node_key_path: Path
    ca_path: Path | None = None
    definition: Path | None = None

    def __post_init__(self) -> None:
        if self.definition is not None:
            file, _, name = str(self.definition).rpartition(":")
            if not file.endswith(".py") or not name.isidentifier():
                raise ValueError(f"federation.definition is '{self.definition}', must be FILE.py:NAME")
        _check_address(self.superlink, "federation.superlink")


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalSettings:
    """Where the device's certificate is renewed before it ends; `server` is HOST:PORT of the proxy."""

    server: str

    def __post_init__(self) -> None:
        _check_address(self.server, "renewal.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySettings:
    """The owner's own limits, held over any plan of the coordinator.

    Attributes:
        epsilon_limit: Largest epsilon that one model may cost over the device's lifetime; > 0.
        total_epsilon_limit: Largest that all models together may cost; None means the same as for one.
        noise_multiplier_limit: Least noise multiplier of a run; >= 0.
        delta: At which the lifetime epsilon is shown; (0, 1).
        trust_coordinator: Whether the coordinator may see updates that have no noise yet, as the privacy unit `device`
            needs: it then adds the noise to the sum of many.
    """

    epsilon_limit: Decimal = Decimal(8)
    total_epsilon_limit: Decimal | None = None
    noise_multiplier_limit: Decimal = Decimal(0)
    delta: Decimal = Decimal("0.001")
    trust_coordinator: bool = False

    def __post_init__(self) -> None:
        for name, limit in (("epsilon_limit", self.epsilon_limit), ("total_epsilon_limit", self.total_limit)):
            if not limit.is_finite() or limit <= 0:
                raise ValueError(f"privacy.{name} is {limit}, must be > 0")
        if not self.noise_multiplier_limit.is_finite() or self.noise_multiplier_limit < 0:
            raise ValueError(f"privacy.noise_multiplier_limit is {self.noise_multiplier_limit}, must be >= 0")
        if not self.delta.is_finite() or not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta is {self.delta}, must be in (0, 1)")

    @property
    def total_limit(self) -> Decimal:
        """Over all models."""
        return self.epsilon_limit if self.total_epsilon_limit is None else self.total_epsilon_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """Who answers.

    Attributes:
        challenger: Folder of a second version of the model, loaded beside the fleet's champion.
        weight: Share of the answers that are the challenger's, 0 to 1.
        shadow: The champion answers everybody, and the challenger is compared with it.
        repository: Callers may load and unload the model.
    """

    challenger: Path | None = None
    weight: float = 0.0
    shadow: bool = False
    repository: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"serving.weight is {self.weight}, must be in 0..1")
        if self.shadow and self.weight:
            raise ValueError("serving.shadow and serving.weight: a challenger answers or is compared, not both")
        if self.challenger is None and (self.shadow or self.weight):
            raise ValueError("serving.challenger is missing: serving.weight and serving.shadow need one")


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """How the device reports measurements of itself.

    Attributes:
        interval_s: Between two reports.
        share_quality: Whether the fleet may know in numbers why a version did not pass its probation on this device's
            own requests.
    """

    interval_s: float = 60.0
    share_quality: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.interval_s <= 86_400:
            raise ValueError(f"telemetry.interval_s is {self.interval_s}, must be in 1..86400")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRule:
    """What is done to one column of every row before anything else; exactly one of these.

    Attributes:
        drop: Left out.
        hash: Replaced by its HMAC with a key that never leaves the device.
        step: Rounded to a multiple of this number.
        period: A date, cut down to its year, month, week or day.
    """

    drop: bool = False
    hash: bool = False
    step: Decimal | None = None
    period: Literal["year", "month", "week", "day"] | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not (self.step.is_finite() and self.step > 0):
            raise ValueError(f"samples.fields: step is {self.step}, must be > 0")
        if sum((self.drop, self.hash, self.step is not None, self.period is not None)) != 1:
            raise ValueError("samples.fields: each field has exactly one of drop, hash, step and period")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """What becomes a private sample of this device.

    Attributes:
        consent: Whether the owner lets answered requests become samples; nothing of them is remembered without it.
        keep_share: Share of them that is kept.
        feedback_max: Answered requests that wait for their truth, at most.
        feedback_ttl_s: How long each waits.
        max_count: Samples kept at most.
        when_full: Whether one more is refused, or the oldest gives way.
        keep_days: How long each is kept; None for ever.
        key_command: Prints the key that samples are sealed with, as 64 hex digits or 32 bytes; None for a file.
        forget_by: Columns whose values, by their rules, are kept with a sample only to find it when it is to be forgotten.
        fields: Rules by column, for rows whose values have names.
        mqtt_topic: Where a sensor publishes samples, on a broker of this device; None for none.
    """

    consent: bool = False
    keep_share: float = 1.0
    feedback_max: int = 1000
    feedback_ttl_s: float = 86_400.0
    max_count: int = 100_000  # at 3 kB a sample (28 x 28 floats) 300 MB of disk, and of memory in a round of training
    when_full: Literal["refuse", "forget_oldest"] = "refuse"
    keep_days: float | None = None
    key_command: str | None = None
    forget_by: tuple[str, ...] = ()
    fields: dict[str, FieldRule] = field(default_factory=dict)
    mqtt_topic: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"samples.keep_share is {self.keep_share}, must be in (0, 1]")
        if not 1 <= self.feedback_max <= 100_000:
            raise ValueError(f"samples.feedback_max is {self.feedback_max}, must be in 1..100000")
        if not 1 <= self.feedback_ttl_s <= 31 * 86_400:
            raise ValueError(f"samples.feedback_ttl_s is {self.feedback_ttl_s}, must be in 1..2678400")
        if not 1 <= self.max_count <= 100_000_000:
            raise ValueError(f"samples.max_count is {self.max_count}, must be in 1..100000000")
        if self.keep_days is not None and not 0 < self.keep_days <= 36_525:
            raise ValueError(f"samples.keep_days is {self.keep_days}, must be in (0, 36525]")
        if self.key_command is not None and not self.key_command.strip():
            raise ValueError("samples.key_command is empty, must be a command that prints a key")
        for column in self.forget_by:
            if column == "y" or (column in self.fields and self.fields[column].drop):
                raise ValueError(f"samples.forget_by: {column!r:.80} is the target, or dropped: no column to find by")
        if self.mqtt_topic is not None:
            self._check_topic(self.mqtt_topic)

    def _check_topic(self, topic: str) -> None:
        if not topic or set(topic) & set("+#\0") or topic.startswith((PREFIX, "$")):
            raise ValueError(f"samples.mqtt_topic is {topic!r:.80}, must be one topic outside {PREFIX}")
        if not self.consent:
            raise ValueError("samples.mqtt_topic needs samples.consent = true: nobody hands these samples in by hand")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """Everything an agent is told.

    Attributes:
        model: The one model it serves.
        state_dir: Everything it keeps; made on the first start.
        tuf_root_path: The root of trust that enrolment put there.
        identity: Who it is to broker and proxy, as enrolment wrote it; None where the broker is on the loopback.
        renewal: None for a certificate that somebody else renews.
        grpc: None for a device that answers over HTTP only.
        federation: None for a device that only serves.
        region: Which releases may ask for; "" for none.
    """

    device_id: str
    fleet: str
    model: str
    state_dir: Path
    tuf_root_path: Path
    region: str = ""
    http: HttpSettings = field(default_factory=HttpSettings)
    identity: Identity | None = None
    renewal: RenewalSettings | None = None
    grpc: GrpcSettings | None = None
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    updates: UpdateSettings = field(default_factory=UpdateSettings)
    federation: FederationSettings | None = None
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    samples: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        if self.samples.mqtt_topic is not None and self.broker.host not in _LOOPBACK:
            raise ValueError(
                f"samples.mqtt_topic: broker.host is {self.broker.host!r}, must be one of {', '.join(_LOOPBACK)}: "
                "samples do not cross a network"
            )
        if self.broker.tls and self.identity is None:
            raise ValueError("broker.tls needs a section [identity]: ca_path, cert_path, key_path")
        if self.broker_identity is None and self.broker.host not in _LOOPBACK:
            raise ValueError(
                f"broker.host is {self.broker.host!r:.80}, must be one of {', '.join(_LOOPBACK)} without TLS, "
                "which needs a section [identity]"
            )
        if self.federation and self.federation.ca_path is None and self.identity is None:
            raise ValueError("[federation] needs a section [identity], or its own ca_path")
        if self.renewal and self.identity is None:
            raise ValueError("[renewal] needs a section [identity]: ca_path, cert_path, key_path")
        check_name(self.device_id, "device_id")
        check_name(self.fleet, "fleet")
        check_name(self.model, "model")
        if self.region:
            check_name(self.region, "region")

    @property
    def broker_identity(self) -> Identity | None:
        """What the broker is shown; None to speak to it without TLS."""
        return None if self.broker.tls is False else self.identity

    @property
    def superlink_ca_path(self) -> Path | None:
        """Certificate authority of the SuperLink; None for a device that only serves."""
        if self.federation is None:
            return None
        return self.federation.ca_path or (self.identity.ca_path if self.identity else None)

    @property
    def uds_path(self) -> Path:
        """Where the Unix socket is."""
        return self.http.uds or self.state_dir / "agent.sock"

    @property
    def samples_path(self) -> Path:
        return self.state_dir / "samples.db"

    @property
    def training_dir(self) -> Path:
        return self.state_dir / "training"


def load_agent_settings(path: Path) -> AgentSettings:
    """Return the settings in the TOML file at `path`; raises SettingsError."""
    return load_settings(path, AgentSettings, prefix="EDGE_AGENT")


def _check_address(address: str, key: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{key} is {address!r}, must be HOST:PORT")
    _check_port(int(port), key)


def _check_port(port: int, key: str) -> None:
    if not 1 <= port <= 65_535:
        raise ValueError(f"{key} is {port}, must be in 1..65535")
