"""Enrolment: one bundle of files makes a machine a device of this fleet."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fl_server.errors import UsageError
from fl_server.fleet.roster import Roster, RosterError
from models.contract.encoding import build_json
from models.contract.files import sync_directory
from models.contract.floors import FLOORS_NAME, Floors
from models.contract.topics import check_name

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

[broker]
host = "{broker_host}"
port = {broker_port}

[federation]                   # without this section the device only serves
superlink = "{superlink}"
ca_path = "ca.pem"
node_key_path = "node.key"     # this device's identity in training: keep it secret
# definition = "model.py:definition"  # your copy, for a model that trains with the Opacus engine

[privacy]                      # the owner's own limits, held over any plan of the coordinator
epsilon_limit = "8"            # largest epsilon of one model, over the device's lifetime
# total_epsilon_limit = "8"    # of all models together; without it as much as of one
noise_multiplier_limit = "0"   # smallest noise multiplier
# trust_coordinator = true     # for runs of the unit device: it sees updates that have no noise yet
delta = "0.001"

[telemetry]
interval_s = 60
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What every bundle of a fleet says."""

    fleet: str
    broker_host: str
    broker_port: int
    superlink: str
    ca: bytes
    tuf_root: bytes
    floors: Floors


def enroll_device(roster: Roster, federation: Federation, *, device_id: str, model: str, out_dir: Path) -> None:
    """Enrol a device and write its bundle to `out_dir`; both happen, or neither.

    Raises:
        RosterError: A name is not allowed, or the id is taken.
        UsageError: `out_dir` holds something.
    """
    try:
        check_name(device_id, "device id")
        check_name(model, "model")
    except ValueError as error:
        raise RosterError(str(error)) from error
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir} is not an empty folder; a bundle gets one of its own")
    key = ec.generate_private_key(ec.SECP384R1())  # the curve that Flower's node authentication asks for
    public_key = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    config = _CONFIG.format(
        device_id=device_id,
        fleet=federation.fleet,
        model=model,
        broker_host=federation.broker_host,
        broker_port=federation.broker_port,
        superlink=federation.superlink,
    )
    files = {
        "edge-agent.toml": config.encode(),
        "root.json": federation.tuf_root,
        FLOORS_NAME: build_json(federation.floors),
        "ca.pem": federation.ca,
        "node.key": key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    }
    with roster.enrolling(device_id, public_key):
        _save_bundle(out_dir, files)


def _save_bundle(out_dir: Path, files: Mapping[str, bytes]) -> None:
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
