"""The folder of files that makes a machine a device of a fleet: its configuration, and how it reaches the disk.

Made by the coordinator for a device that gets it by hand, or by the device itself from what the coordinator answered;
the configuration's text is here and never travels, since an agent runs commands that its configuration names.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.contract.files import sync_directory
from models.contract.topics import check_name

CONFIG_NAME, ROOT_NAME, CA_NAME = "edge-agent.toml", "root.json", "ca.pem"
CERT_NAME, KEY_NAME, NODE_KEY_NAME = "device.pem", "device.key", "node.key"
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]{0,252}")
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]{0,252}:[0-9]{1,5}")
_CONFIG = """\
# Configuration of one device: edge-agent run --config edge-agent.toml
# EDGE_AGENT_SECTION__KEY in the environment overrides a key; paths are relative to this file.
device_id = "{device_id}"
fleet = "{fleet}"
model = "{model}"
state_dir = "state"
tuf_root_path = "root.json"    # the root of trust: what this fleet's releases are signed against

[http]
host = "127.0.0.1"             # the local inference API; also on a Unix socket in state_dir
port = 8080

[identity]                     # who this device is to broker and proxy; both keys are secret
ca_path = "ca.pem"
cert_path = "device.pem"
key_path = "device.key"

[broker]
host = "{broker_host}"
port = {broker_port}
tls = {broker_tls}

[federation]                   # without this section the device only serves
superlink = "{superlink}"
node_key_path = "node.key"     # this device's identity in training: keep it secret
# definition = "model.py:definition"  # your copy, for a model that trains with the Opacus engine

[privacy]                      # the owner's own limits, held over any plan of the coordinator
epsilon_limit = "8"            # largest epsilon of one model, over the device's lifetime
# total_epsilon_limit = "8"    # of all models together; without it as much as of one
noise_multiplier_limit = "0"   # smallest noise multiplier
# trust_coordinator = true     # for runs of the unit device: it sees updates that have no noise yet
delta = "0.001"

{renewal}[telemetry]
interval_s = 60
"""
_RENEWAL = """\
[renewal]                      # where the certificate is renewed before it ends
server = "{server}"

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who a device is, and where it finds its fleet.

    Attributes:
        superlink: HOST:PORT of the SuperLink, or of the proxy before it.
        renewal: HOST:PORT where its certificate is renewed; None for nowhere.
    """

    device_id: str
    fleet: str
    model: str
    broker_host: str
    broker_port: int
    broker_tls: bool
    superlink: str
    renewal: str | None = None

    def __post_init__(self) -> None:
        check_name(self.device_id, "device id")
        check_name(self.fleet, "fleet")
        check_name(self.model, "model")
        if not _HOST.fullmatch(self.broker_host) or not 1 <= self.broker_port <= 65_535:
            raise ValueError(f"broker {self.broker_host!r:.80}:{self.broker_port} is no host and port")
        for address in filter(None, (self.superlink, self.renewal)):
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"{address!r:.80} is not HOST:PORT")


def build_config(membership: Membership) -> bytes:
    """Return `edge-agent.toml`, which names the other files of the bundle."""
    renewal = _RENEWAL.format(server=membership.renewal) if membership.renewal else ""
    return _CONFIG.format(
        device_id=membership.device_id,
        fleet=membership.fleet,
        model=membership.model,
        broker_host=membership.broker_host,
        broker_port=membership.broker_port,
        broker_tls=str(membership.broker_tls).lower(),
        superlink=membership.superlink,
        renewal=renewal,
    ).encode()


def is_free(path: Path) -> bool:
    """Return whether a bundle may be written to `path`: nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def save_bundle(out_dir: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` to the folder `out_dir`, which is free: all of them, or none."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))  # mode 0700: it holds a key
    try:
        for name, data in files.items():
            mode = 0o600 if name.endswith(".key") else 0o644
            with os.fdopen(os.open(staging / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(staging)
        staging.rename(out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_directory(out_dir.parent)
