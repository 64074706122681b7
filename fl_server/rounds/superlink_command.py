"""How the SuperLink is started: for registered nodes only, and to run nobody's code."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinkCommand:
    """How to start the SuperLink; `environment` is added to the parent's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


def superlink_command(
    *,
    host: str,
    port: int,
    database_path: Path,
    ca_path: Path,
    certificate_path: Path,
    key_path: Path,
    superexec_secret_path: Path,
) -> SuperLinkCommand:
    """Return how to start a SuperLink that only registered nodes can use and that runs nobody's code.

    Its Control API has no authentication: listen on loopback, or pass on `/v1/fleet/` alone.
    """
    return SuperLinkCommand(
        arguments=(
            str(Path(sys.executable).with_name("flower-superlink")),
            *("--host", host, "--port", str(port)),
            *("--ssl-ca-certfile", str(ca_path), "--ssl-certfile", str(certificate_path)),
            *("--ssl-keyfile", str(key_path)),
            *("--database", str(database_path)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--isolation", "process", "--superexec-auth-secret-file", str(superexec_secret_path)),
        ),
        environment={
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(database_path.parent / "home"),
        },
    )
