"""`edge-agent doctor`: tests what the device service needs, whether or not it runs, and changes nothing that it would not."""

import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from edge_agent.client import AgentClient
from edge_agent.config import AgentSettings, load_agent_settings
from edge_agent.errors import AgentError
from edge_agent.http.guard import TOKEN_NAME
from edge_agent.inference.onnx_backend import OnnxBackend
from edge_agent.inference.sandbox import try_in_sandbox
from edge_agent.lock import LOCK_NAME
from edge_agent.updates.floors import load_signed_at
from edge_agent.updates.slots import Slots
from models.contract.files import is_locked
from models.contract.settings import SettingsError
from models.doctor.certificates import check_certificate, check_pair, check_secret
from models.doctor.findings import Finding, fail, ok, warn
from models.doctor.machine import check_broker, check_clock, check_disk, check_port_free, check_private

_RENEWAL = "have the device enrolled again, or its certificate renewed"
# One Identity node: what any onnxruntime loads in a millisecond.
_GRAPH = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08'
    b"\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def examine(config_path: Path, *, now: datetime) -> list[Finding]:
    """Return what was found on this device; `now` is aware, in UTC."""
    try:
        settings = load_agent_settings(config_path)
    except SettingsError as error:
        return [fail("configuration", str(error), "mend it; edge_agent/README.md has every key")]
    return [ok("configuration", str(config_path)), *_examine(settings, now)]


def _examine(settings: AgentSettings, now: datetime) -> Iterator[Finding]:
    yield _check_root(settings.tuf_root_path)
    yield from _check_certificates(settings, now)
    yield _check_clock(settings.state_dir, now)
    yield _check_broker(settings)
    if settings.state_dir.is_dir():
        yield check_private(settings.state_dir)
        yield check_disk(settings.state_dir)
        yield from (check_secret(path) for path in _find_secrets(settings.state_dir))
    else:
        yield warn("state", f"{settings.state_dir} is not there yet", "start the service, which makes it")
    yield _check_runtime()
    yield from _check_service(settings)


def _check_root(path: Path) -> Finding:
    try:
        path.read_bytes()
    except OSError as error:
        return fail("root of trust", f"{path}: {error.strerror}", "put back root.json of the device's bundle")
    return ok("root of trust", str(path))


def _check_certificates(settings: AgentSettings, now: datetime) -> Iterator[Finding]:
    paths, identity = [settings.superlink_ca_path], settings.identity
    if identity is not None:
        paths += [identity.ca_path, identity.cert_path]
        yield check_pair(identity.cert_path, identity.key_path)
    if settings.federation is not None:
        yield check_secret(settings.federation.node_key_path)
    for path in dict.fromkeys(filter(None, paths)):
        yield check_certificate(path, now=now, renewal=_RENEWAL)


def _check_clock(state_dir: Path, now: datetime) -> Finding:
    try:
        return check_clock(now=now, signed_at=load_signed_at(state_dir / "tuf-floors.json"))
    except (AgentError, OSError) as error:
        return fail("clock", str(error), "restore it from a backup, or have the device enrolled again")


def _check_broker(settings: AgentSettings) -> Finding:
    identity = settings.broker_identity
    try:
        context = None if identity is None else identity.build_context()
    except OSError as error:
        return fail("broker", f"not asked, [identity] cannot be used: {error}", _RENEWAL)
    is_running = is_locked(settings.state_dir / LOCK_NAME)
    return check_broker(settings.broker.host, settings.broker.port, context, is_running=is_running)


def _find_secrets(state_dir: Path) -> Iterator[Path]:
    return (path for name in (TOKEN_NAME, "samples.key", "fields.key") if (path := state_dir / name).exists())


def _check_runtime() -> Finding:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "identity.onnx"
        path.write_bytes(_GRAPH)
        try:
            OnnxBackend(path)
        except AgentError as error:
            return fail("runtime", str(error), "install this device's packages again")
    return ok("runtime", "onnxruntime loads a graph")


def _check_service(settings: AgentSettings) -> Iterator[Finding]:
    try:
        with AgentClient(settings.uds_path) as client:
            status = client.get("/v1/status")
    except AgentError as error:
        if settings.uds_path.is_socket() and not isinstance(error.__cause__, ConnectionRefusedError):
            yield fail("service", str(error), "its log says why; start it again")
            return
        yield warn("service", "not running", "start it: systemctl start edge-agent")
        yield check_port_free(settings.http.host, settings.http.port, key="[http] port")
        if settings.grpc is not None:
            yield check_port_free(settings.grpc.host, settings.grpc.port, key="[grpc] port")
        yield from _check_version(settings.state_dir / "slots")
        return
    version = status["version"]
    if version is None:
        yield warn("service", "runs, without a version to serve", "have the coordinator release one")
    elif not status["connected"]:
        yield warn("service", f"serves version {version}, not connected to the broker", "see the broker's line")
    else:
        yield ok("service", f"serves version {version}, connected")


def _check_version(slots_dir: Path) -> Iterator[Finding]:
    """Yield whether the active version verifies and runs; only where there is one, and no agent uses it."""
    if not (slots_dir / "state.json").exists():
        return
    try:
        active = Slots(slots_dir).active
        if active is None:
            yield fail("version", "no slot verifies", "start the service, which fetches the release again")
            return
        try_in_sandbox(active.directory)
    except (AgentError, OSError) as error:
        yield fail("version", str(error), "start the service, which goes back or fetches the release again")
    else:
        yield ok("version", f"{active.manifest.model} {active.manifest.version} verifies, loads and answers")
