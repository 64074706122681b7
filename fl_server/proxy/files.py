"""The proxy's configuration, made from the template beside this file."""

import os
import pwd
from pathlib import Path
from string import Template

from fl_server.config import LOOPBACK, ServerSettings


class _Template(Template):
    delimiter = "@"  # $ is nginx's own


def save_proxy_files(proxy_dir: Path, settings: ServerSettings) -> None:
    """Write `nginx.conf` to `proxy_dir`; a proxy that only this machine dials listens nowhere else.

    Args:
        proxy_dir: The federation's `proxy/`; paths in what is written are relative to it or to the folder above it.
        settings: Where proxy, SuperLink and coordinator listen.
    """
    proxy = settings.proxy
    is_local = proxy.host in LOOPBACK
    values = {
        "fleet": settings.fleet,
        "user": pwd.getpwuid(os.geteuid()).pw_name,  # who owns the federation's folder, which nobody else may enter
        "bind": ("[::1]:" if proxy.host == "::1" else "127.0.0.1:") if is_local else "",
        "port": proxy.port,
        "enrolment_port": proxy.enrolment_port,
        "superlink_port": settings.superlink.port,
        "coordinator_port": proxy.coordinator_port,
    }
    proxy_dir.mkdir(mode=0o700, exist_ok=True)
    path = proxy_dir / "nginx.conf"
    path.write_text(_Template(Path(__file__).with_name("nginx.conf").read_text()).substitute(values))
    path.chmod(0o600)
