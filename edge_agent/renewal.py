"""Renews the device's certificate long before it ends, in a process of its own: `python -m edge_agent.renewal`.

The present certificate is what asks for the next one, by POST of a request (PKCS #10) to /v1/renew where the device
trains; the key stays where it is. The libraries that this takes are gone with the process.
"""

import asyncio
import json
import logging
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import SystemRandom

from edge_agent.children import bound_this_process, run_child
from edge_agent.config import AgentSettings
from edge_agent.errors import AgentError
from models.contract.files import save_atomically
from models.contract.identity import Identity

log = logging.getLogger(__name__)

FIRST_LOOK_S = 60.0  # at most, after the start: a fleet that starts together does not ask together
INTERVAL_S = 24 * 3600.0
LEFT_SHARE = 1 / 3  # of a certificate's life; four months of a year, in which a device may be switched off
_DEADLINE_S = 60.0
_TIMEOUT_S = 20.0
_CPU_S = 30
_MEMORY_BYTES = 256 * 1024**2
_ANSWER_MAX_BYTES = 16 * 1024


async def keep_renewed(settings: AgentSettings) -> None:
    """Look once a day whether the certificate should be renewed, and do it; returns if there is nobody to ask."""
    if settings.identity is None or settings.federation is None:
        return
    await asyncio.sleep(SystemRandom().uniform(0, FIRST_LOOK_S))
    while True:
        try:
            if said := await asyncio.to_thread(renew, settings):
                log.info("%s", said)
        except AgentError as error:
            log.warning("the certificate was not renewed, tried again in a day: %s", error)
        await asyncio.sleep(INTERVAL_S)


def renew(settings: AgentSettings) -> str:
    """Renew the certificate if less than a third of its life is left; blocks.

    Returns:
        What was done; empty if nothing had to be.

    Raises:
        AgentError: It should be renewed, and was not.
    """
    assert settings.identity is not None
    assert settings.federation is not None
    given = {
        "device_id": settings.device_id,
        "address": settings.federation.superlink,
        "ca_path": str(settings.identity.ca_path),
        "cert_path": str(settings.identity.cert_path),
        "key_path": str(settings.identity.key_path),
    }
    said = run_child("edge_agent.renewal", given=json.dumps(given).encode(), deadline_s=_DEADLINE_S)
    return said.decode(errors="replace").strip()


def main() -> int:
    """Do what standard input asks for; print what was done or what went wrong, and return the exit code."""
    bound_this_process(memory_bytes=_MEMORY_BYTES, cpu_s=_CPU_S, writes=True)
    from http.client import HTTPException

    given = json.loads(sys.stdin.buffer.read())
    device_id, address = given.pop("device_id"), given.pop("address")
    identity = Identity(**{name: Path(path) for name, path in given.items()})
    try:
        print(_renew(identity, device_id, address))
    except (OSError, ValueError, HTTPException) as error:
        print(error)
        return 1
    return 0


def _renew(identity: Identity, device_id: str, address: str) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    present = x509.load_pem_x509_certificate(identity.cert_path.read_bytes())
    ends, now = present.not_valid_after_utc, datetime.now(UTC)
    if ends - now > LEFT_SHARE * (ends - present.not_valid_before_utc):
        return ""
    if ends < now - timedelta(minutes=5):
        raise ValueError(f"{identity.cert_path} ended on {ends:%Y-%m-%d}: enrol this device again")
    key = load_pem_private_key(identity.key_path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{identity.key_path} is no EC key")
    request = x509.CertificateSigningRequestBuilder().subject_name(present.subject).sign(key, hashes.SHA256())
    answer = _ask(identity, address, request.public_bytes(Encoding.PEM))
    renewed = x509.load_pem_x509_certificate(answer)
    try:
        renewed.verify_directly_issued_by(x509.load_pem_x509_certificates(identity.ca_path.read_bytes())[0])
    except Exception as error:  # the library's own InvalidSignature says nothing, and is no ValueError
        raise ValueError(f"{address} answered with a certificate of another authority") from error
    if renewed.public_key() != key.public_key() or renewed.subject != present.subject:
        raise ValueError(f"{address} answered with a certificate that is not for {device_id}")
    if renewed.not_valid_after_utc <= ends:
        raise ValueError(f"{address} answered with a certificate that does not last longer")
    save_atomically(identity.cert_path, renewed.public_bytes(Encoding.PEM))
    return f"the certificate is renewed until {renewed.not_valid_after_utc:%Y-%m-%d}"


def _ask(identity: Identity, address: str, request: bytes) -> bytes:
    from http.client import OK, HTTPSConnection

    host, _, port = address.rpartition(":")
    connection = HTTPSConnection(host.strip("[]"), int(port), context=identity.build_context(), timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/renew", request, {"Content-Type": "application/pkcs10"})
        response = connection.getresponse()
        answer = response.read(_ANSWER_MAX_BYTES)
    finally:
        connection.close()
    if response.status != OK:
        raise ValueError(f"{address} refuses: {response.status} {answer[:200].decode(errors='replace')}")
    return answer


if __name__ == "__main__":
    sys.exit(main())
