"""`fl-server init`: creates the directory of a federation, whole or not at all."""

import os
import re
import secrets
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from fl_server.authority import Authority, save_secret
from fl_server.config import load_server_settings
from fl_server.directory import Directory
from fl_server.errors import UsageError
from fl_server.fleet.broker_files import save_broker_files
from fl_server.fleet.roster import Roster
from fl_server.jobs import Jobs
from fl_server.proxy.files import save_proxy_files
from fl_server.registry.registry import Registry
from fl_server.rollout.repository import ReleaseRepository
from models.contract.files import sync_directory
from models.contract.topics import check_name

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")  # addresses are HOST:PORT: IPv6 needs a name
_CONFIG = """\
# Configuration of this federation: fl-server run --config fl-server.toml
# FL_SERVER_SECTION__KEY in the environment overrides a key; paths are relative to this file.
fleet = "{fleet}"

[broker]                      # MQTT 5 over TLS, for the coordinator and for devices alike; see broker/mosquitto.conf
host = "{host}"
port = {broker_port}

[superlink]                   # Flower's SuperLink, a child of the coordinator, on the loopback
port = 9092

[proxy]                       # nginx, the devices' only way to it; these ports are in proxy/nginx.conf, too
host = "{host}"
port = 9443                   # for devices with a certificate
enrolment_port = 9444         # for devices that have only a token yet

[rounds]
deadline_s = 60.0             # of one round
join_timeout_s = 60.0         # how long a run waits for the devices it woke
offline_grace_s = 75.0        # how long a round waits for a device that the broker lost
quorum = 0.5                  # least share of the woken devices that makes a round
idle_timeout_s = 60           # after how long without a message a device's training process ends
poll_budget_per_s = 40.0      # requests a second of all training processes together

# One section a model. validation is the server's own held-out data, an npz of x and y;
# calibration, an npz of x, sets the quantization ranges (without it: the x of validation).
# [models.digits]
# definition = "models.definitions.digits:definition"   # or "heart.py:definition"
# validation = "validation.npz"
# calibration = "calibration.npz"
"""


def initialise(path: Path, *, fleet: str, host: str, broker_port: int = 8883) -> None:
    """Create a federation in the folder `path`, which must be new or empty.

    Args:
        path: Appears whole, or not at all.
        fleet: Its name in every topic and order.
        host: Where devices reach this machine; the servers' certificates are valid for it.
        broker_port: Where the broker listens.

    Raises:
        UsageError: `path` holds something, or a name or port is not allowed.
    """
    try:
        check_name(fleet, "fleet")
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not _HOST.fullmatch(host):
        raise UsageError(f"host {host!r:.80} is neither a host name nor an IPv4 address")
    if not 1 <= broker_port <= 65_535:
        raise UsageError(f"--broker-port is {broker_port}, must be in 1..65535")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not an empty folder; a federation gets one of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # mode 0700: it holds keys
    try:
        _fill(Directory(staging), fleet, host, broker_port)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_directory(path.parent)


def _fill(directory: Directory, fleet: str, host: str, broker_port: int) -> None:
    directory.config_path.write_text(_CONFIG.format(fleet=fleet, host=host, broker_port=broker_port))
    authority = Authority.create(directory.ca_dir, fleet=fleet)
    authority.issue_servers(sorted({"127.0.0.1", "localhost", host}))
    authority.save_crl([])
    save_broker_files(directory.broker_dir, fleet=fleet, host=host, port=broker_port)
    save_proxy_files(directory.proxy_dir, load_server_settings(directory.config_path))
    ReleaseRepository.create(directory, now=datetime.now(UTC))
    directory.superlink_dir.mkdir(mode=0o700)
    save_secret(directory.superexec_secret_path, secrets.token_hex(32).encode())
    for folder in (directory.architectures_dir, directory.runs_dir, directory.logs_dir, directory.registry_dir):
        folder.mkdir()
    with Roster(directory.database_path), Jobs(directory.database_path), Registry(directory.registry_dir):
        pass  # opening makes them
    for parent, _, names in os.walk(directory.path):
        for name in names:
            _sync_file(Path(parent) / name)
        sync_directory(Path(parent))


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
