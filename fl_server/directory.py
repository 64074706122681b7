"""Where things lie in a coordinator's directory."""

from dataclasses import dataclass
from pathlib import Path

from fl_server.config import CONFIG_NAME

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
