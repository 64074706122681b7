"""The broker's configuration and access list, made from the templates beside this file."""

import os
import pwd
from pathlib import Path
from string import Template

from fl_server.config import LOOPBACK
from models.contract.topics import check_name

_TEMPLATES_DIR = Path(__file__).with_name("broker")


def save_broker_files(broker_dir: Path, *, fleet: str, host: str, port: int) -> None:
    """Write `mosquitto.conf` and `acl` to `broker_dir`; a broker that only this machine dials listens nowhere else.

    Args:
        broker_dir: The federation's `broker/`; paths in what is written are relative to the folder above it.
        fleet: Whose topics the access list is about.
        host: Where devices reach this machine.
        port: What the broker listens on.
    """
    values = {
        "fleet": check_name(fleet, "fleet"),
        "port": port,
        "bind": host if host in LOOPBACK else "",
        "user": pwd.getpwuid(os.geteuid()).pw_name,  # who owns the keys; a broker that root starts becomes this user
    }
    broker_dir.mkdir(mode=0o700, exist_ok=True)
    for name in ("mosquitto.conf", "acl"):
        text = Template((_TEMPLATES_DIR / name).read_text()).substitute(values)
        (broker_dir / name).write_text(text)
        (broker_dir / name).chmod(0o600)
