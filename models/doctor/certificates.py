"""Whether certificates and keys are there, hold, and are nobody else's."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from models.doctor.findings import Finding, fail, ok, warn

RENEW_BEFORE = timedelta(days=30)


def check_certificate(path: Path, *, now: datetime, renewal: str) -> Finding:
    """Return whether the certificate at `path`, PEM, is valid at `now`, aware; `renewal` says how to get another."""
    what = f"certificate {path.name}"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        return fail(what, f"{path}: {error.strerror}", renewal)
    except ValueError:
        return fail(what, f"{path} is no certificate in PEM", renewal)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        return fail(what, f"valid only from {_show(begins)} on", "set this machine's clock")
    return _judge_end(what, ends, now=now, renewal=renewal)


def check_revocations(path: Path, *, now: datetime, renewal: str) -> Finding:
    """Return whether the list of revoked certificates at `path`, PEM, still holds at `now`."""
    what = f"revocations {path.name}"
    try:
        ends = x509.load_pem_x509_crl(path.read_bytes()).next_update_utc or datetime.max.replace(tzinfo=UTC)
    except OSError as error:
        return fail(what, f"{path}: {error.strerror}", renewal)
    except ValueError:
        return fail(what, f"{path} is no list of revocations in PEM", renewal)
    if now >= ends:
        return fail(what, f"expired on {_show(ends)}", renewal)
    return ok(what, f"valid until {_show(ends)}")


def check_pair(certificate_path: Path, key_path: Path) -> Finding:
    """Return whether the key at `key_path` is that of the certificate."""
    what = f"key {key_path.name}"
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = load_pem_private_key(key_path.read_bytes(), None)
    except OSError as error:
        return fail(what, f"{error.filename}: {error.strerror}", "put the key there that belongs to the certificate")
    except (ValueError, TypeError):
        return fail(what, f"{key_path} is no private key in PEM", "put the key there that belongs to the certificate")
    if key.public_key() != certificate.public_key():
        return fail(what, f"not the key of {certificate_path.name}", "put back the pair as it was made")
    return check_secret(key_path)


def check_secret(path: Path) -> Finding:
    """Return whether the file at `path` is there, and its owner's alone."""
    what = f"key {path.name}"
    try:
        mode = path.stat().st_mode & 0o777
        path.open("rb").close()
    except OSError as error:
        return fail(what, f"{path}: {error.strerror}", "put it back from where it was made or from a backup")
    if mode & 0o077:
        return fail(what, f"mode {mode:04o} lets others at it", f"chmod 600 {path}")
    return ok(what, "its owner's alone")


def _judge_end(what: str, ends: datetime, *, now: datetime, renewal: str) -> Finding:
    if now >= ends:
        return fail(what, f"expired on {_show(ends)}", renewal)
    if now >= ends - RENEW_BEFORE:
        return warn(what, f"expires on {_show(ends)}", renewal)
    return ok(what, f"valid until {_show(ends)}")


def _show(when: datetime) -> str:
    return f"{when:%Y-%m-%d}"
