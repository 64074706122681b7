"""`fl-server doctor`: tests what a coordinator needs, whether or not it runs, and changes nothing."""

import shutil
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

from fl_server.config import CONFIG_NAME, ProxySettings, ServerSettings, find_missing, load_server_settings
from fl_server.directory import Directory
from fl_server.errors import ServerError
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rollout.trust import LIFETIMES, ONLINE_ROLES, RoleStatus
from models.contract.files import is_locked
from models.contract.settings import SettingsError
from models.doctor.certificates import check_certificate, check_pair, check_revocations
from models.doctor.findings import Finding, fail, ok, warn
from models.doctor.machine import (
    ANSWER_TIMEOUT_S,
    check_broker,
    check_clock,
    check_disk,
    check_port_free,
    check_private,
)

_RENEWAL = "restore ca/ from a backup, or make a new federation: its certificates are made by fl-server init"
_RESTORE = "restore it from a backup"


def examine(config_path: Path, *, now: datetime) -> list[Finding]:
    """Return what was found in the federation of `config_path`; `now` is aware, in UTC."""
    try:
        settings = load_server_settings(config_path)
    except SettingsError as error:
        return [fail("configuration", str(error), "mend it; fl_server/README.md has every key")]
    directory = Directory(config_path.resolve().parent)
    if not directory.database_path.exists():
        found = f"{directory.path} holds no federation"
        return [fail("configuration", found, f"fl-server init makes one, and its {CONFIG_NAME}")]
    return [ok("configuration", str(config_path)), *_examine(settings, directory, now)]


def _examine(settings: ServerSettings, directory: Directory, now: datetime) -> Iterator[Finding]:
    yield from _check_models(settings, directory)
    yield check_private(directory.path)
    yield check_disk(directory.path)
    yield _check_database(directory.database_path)
    yield from _check_certificates(directory.ca_dir, now)
    yield from _check_signing(directory, now)
    yield _check_broker(settings, directory)
    if settings.proxy.used:
        yield _check_proxy(settings.proxy)
    yield _check_runtime()
    yield _check_superlink(settings, directory)


def _check_models(settings: ServerSettings, directory: Directory) -> Iterator[Finding]:
    if not settings.models:
        yield warn("models", "none is configured", "add a section [models.NAME]")
    for name in settings.models:
        if missing := find_missing(settings, name, directory.path):
            yield fail(
                f"model {name}", f"missing or unreadable: {'; '.join(missing)}", "put it there, or change the key"
            )
        else:
            yield ok(f"model {name}", "its files are there")


def _check_database(path: Path) -> Finding:
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return fail("database", f"{path}: {error}", _RESTORE)
    return ok("database", str(path)) if said == "ok" else fail("database", f"{path}: {said}", _RESTORE)


def _check_certificates(ca_dir: Path, now: datetime) -> Iterator[Finding]:
    keys = sorted(ca_dir.glob("*.key.pem"))
    for path in sorted({ca_dir / "ca.pem", ca_dir / "superlink.pem", *ca_dir.glob("*.pem")}.difference(keys)):
        if path.name == "crl.pem":
            yield check_revocations(path, now=now, renewal="start the coordinator, or sign the list again")
        else:
            yield check_certificate(path, now=now, renewal=_RENEWAL)
    for path in keys:
        yield check_pair(path.with_name(path.name.replace(".key.pem", ".pem")), path)


def _check_signing(directory: Directory, now: datetime) -> Iterator[Finding]:
    """Yield the clock's finding and one for each role that signs what devices trust."""
    repository = ReleaseRepository(directory)
    try:
        signed_at, roles = repository.find_signed_at(), repository.describe()
    except (ServerError, OSError) as error:
        yield fail("signatures", str(error), _RESTORE)
        return
    yield check_clock(now=now, signed_at=signed_at)
    yield from (_judge_role(role, now) for role in roles)
    offline = [path.name for path in directory.offline_keys_dir.glob("*.pem")]
    if offline:
        found = f"{len(offline)} are on this machine"
        yield warn("offline keys", found, f"move {directory.offline_keys_dir} to sticks: who breaks in here has them")
    else:
        yield ok("offline keys", "none is on this machine")


def _judge_role(role: RoleStatus, now: datetime) -> Finding:
    what, found = f"role {role.role}", f"signed until {role.expires:%Y-%m-%d %H:%M}Z"
    is_online = role.role in ONLINE_ROLES
    if is_online and sum(key.place is not None for key in role.keys) < role.threshold:
        return fail(what, f"{found}, and its key is not here", "restore keys/online, or fl-server keys rotate")
    if now >= role.expires:
        advice = "start the coordinator" if is_online else f"fl-server keys renew {role.role} --keys DIR, at once"
        return fail(what, found.replace("until", "only until"), advice)
    if not is_online and role.expires - now <= LIFETIMES[role.role] / 4:
        return warn(what, found, f"fl-server keys renew {role.role} --keys DIR")
    return ok(what, found)


def _check_broker(settings: ServerSettings, directory: Directory) -> Finding:
    try:
        identity = directory.describe_coordinator(settings.broker)
        context = None if identity is None else identity.build_context()
    except OSError as error:
        return fail("broker", f"not asked, its certificates cannot be used: {error}", _RENEWAL)
    is_running = is_locked(directory.lock_path)
    return check_broker(settings.broker.host, settings.broker.port, context, is_running=is_running)


def _check_proxy(proxy: ProxySettings) -> Finding:
    address = f"{proxy.host}:{proxy.port}"
    try:
        socket.create_connection((proxy.host, proxy.port), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        advice = "start nginx with proxy/nginx.conf: devices train and renew certificates through it alone"
        return fail("proxy", f"{address}: {error.strerror or error}", advice)
    return ok("proxy", f"{address} takes connections")


def _check_runtime() -> Finding:
    try:
        import onnxruntime
        import torch
    except ImportError as error:
        return fail("runtime", str(error), "pip install -c constraints.txt 'edge-fl[server]'")
    superlink = shutil.which("flower-superlink", path=str(Path(sys.executable).parent))
    if superlink is None:
        return fail("runtime", f"no flower-superlink beside {sys.executable}", "pip install 'edge-fl[server]' there")
    return ok("runtime", f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {superlink}")


def _check_superlink(settings: ServerSettings, directory: Directory) -> Finding:
    host, port, address = settings.superlink.host, settings.superlink.port, settings.superlink.address
    if not is_locked(directory.lock_path):
        free = check_port_free(host, port, key="[superlink] port")
        return free if free.level == "fail" else warn("service", "not running", "start it: systemctl start fl-server")
    try:
        socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        advice = f"it is starting, or {directory.logs_dir / 'superlink.log'} says why not"
        return fail("service", f"runs, but its SuperLink on {address} does not answer: {error.strerror}", advice)
    return ok("service", f"runs, and its SuperLink answers on {address}")
