"""Where things lie in a coordinator's directory."""

from dataclasses import dataclass
from pathlib import Path

from fl_server.config import CONFIG_NAME, BrokerSettings
from models.contract.identity import Identity

ONLINE_KEYS = ("releases", "snapshot", "timestamp", "orders")
OFFLINE_KEYS = ("root-1", "root-2", "root-3", "targets", "graphs")


@dataclass(frozen=True, slots=True)
class Directory:
    """The directory that `fl-server init` creates; nothing here touches the disk."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def database_path(self) -> Path:
        return self.path / "coordinator.db"

    @property
    def lock_path(self) -> Path:
        return self.path / "coordinator.lock"

    @property
    def ca_path(self) -> Path:
        return self.path / "ca" / "ca.pem"

    @property
    def ca_dir(self) -> Path:
        return self.path / "ca"

    def describe_coordinator(self, broker: BrokerSettings) -> Identity | None:
        """Return who the coordinator is to the broker; None without TLS."""
        if not broker.tls:
            return None
        return Identity(
            ca_path=broker.ca_path or self.ca_path,
            cert_path=broker.cert_path or self.ca_dir / "coordinator.pem",
            key_path=broker.key_path or self.ca_dir / "coordinator.key.pem",
        )

    @property
    def pid_paths(self) -> tuple[Path, ...]:
        """Where the servers that read the list of revoked certificates say which process they are."""
        return (self.broker_dir / "mosquitto.pid", self.proxy_dir / "nginx.pid")

    @property
    def broker_dir(self) -> Path:
        """The broker's configuration, and what it keeps."""
        return self.path / "broker"

    @property
    def proxy_dir(self) -> Path:
        """The proxy's configuration, and what it keeps for a moment."""
        return self.path / "proxy"

    @property
    def online_keys_dir(self) -> Path:
        return self.path / "keys" / "online"

    @property
    def offline_keys_dir(self) -> Path:
        return self.path / "keys" / "offline"

    @property
    def order_key_path(self) -> Path:
        """The key that signs orders to devices."""
        return self.online_keys_dir / "orders.pem"

    @property
    def statement_key_path(self) -> Path:
        """The key that signs the bundles beside versions; made by the first release."""
        return self.path / "keys" / "statements.pem"

    @property
    def statement_public_key_path(self) -> Path:
        return self.path / "keys" / "statements.pub.pem"

    @property
    def tuf_dir(self) -> Path:
        return self.path / "tuf"

    @property
    def superlink_dir(self) -> Path:
        return self.path / "superlink"

    @property
    def superexec_secret_path(self) -> Path:
        return self.superlink_dir / "secret"

    @property
    def registry_dir(self) -> Path:
        return self.path / "registry"

    @property
    def architectures_dir(self) -> Path:
        return self.path / "architectures"

    @property
    def runs_dir(self) -> Path:
        return self.path / "runs"

    @property
    def logs_dir(self) -> Path:
        return self.path / "logs"
