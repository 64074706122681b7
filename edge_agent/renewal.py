"""The device's certificate is renewed when two thirds of its time are over: `python -m edge_agent.renewal SERVER CA CERT KEY`.

A child of the agent once in a while, since what parses certificates would take memory in between. Prints the reason
and ends with 1 if it fails; nothing if nothing is due.
"""

import asyncio
import datetime as dt
import logging
import random
import sys
from pathlib import Path

from edge_agent.children import run_child
from edge_agent.errors import AgentError, StalledError
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.identity import Identity

_log = logging.getLogger(__name__)

INTERVAL_S = 12 * 3600.0  # a certificate of a year is due for four months
DEADLINE_S = 120.0


async def keep_renewed(identity: Identity, server: str) -> None:
    """Look after the certificate until cancelled; what goes wrong is logged, and tried again half a day later."""
    paths = (str(identity.ca_path), str(identity.cert_path), str(identity.key_path))
    while True:
        try:
            said = await asyncio.to_thread(run_child, "edge_agent.renewal", server, *paths, deadline_s=DEADLINE_S)
            if said:
                _log.info("%s", said.decode(errors="replace").strip())
        except AgentError as error:
            _log.warning("the certificate %s is not renewed: %s", identity.cert_path, error)
        await asyncio.sleep(INTERVAL_S * random.uniform(0.5, 1))


def renew(server: str, identity: Identity, *, now: dt.datetime) -> dt.datetime | None:
    """Renew the certificate if it is due, and return when the new one ends; the key stays.

    Args:
        server: HOST:PORT of the proxy.
        identity: Whose certificate file is replaced.
        now: With time zone.

    Raises:
        AgentError: It is due and could not be renewed, or a file cannot be read.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from edge_agent.enrolment import ask, build_request, check_certificate, parse_server
    from models.contract.enrolment import RENEW_PATH, RenewalAnswer, RenewalRequest

    try:
        held = identity.cert_path.read_bytes()
        present = x509.load_pem_x509_certificate(held)
        key = load_pem_private_key(identity.key_path.read_bytes(), None)
        ca = identity.ca_path.read_bytes()
    except (OSError, ValueError) as error:
        raise StalledError(f"the device's certificate or key cannot be read: {error}") from error
    starts, ends = present.not_valid_before_utc, present.not_valid_after_utc
    if ends - now > (ends - starts) / 3:
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StalledError(f"{identity.key_path} is no elliptic curve key")
    (name,) = present.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    wish = RenewalRequest(request=build_request(str(name.value), key).decode())
    try:
        save_atomically(identity.cert_path, held)  # what could not be kept must not be issued, again and again
        answer = ask(parse_server(server), RENEW_PATH, wish, RenewalAnswer, identity.build_context())
        renewed = check_certificate(answer.certificate.encode(), key.public_key(), ca)
        save_atomically(identity.cert_path, answer.certificate.encode())
    except OSError as error:
        raise StalledError(str(error)) from error
    return renewed.not_valid_after_utc


def main() -> int:
    """Return 0, or 1 with the reason on stdout."""
    server, ca, cert, key = sys.argv[1:]
    identity = Identity(ca_path=Path(ca), cert_path=Path(cert), key_path=Path(key))
    try:
        ends = renew(server, identity, now=dt.datetime.now(dt.UTC))
    except (AgentError, ContractError) as error:
        print(error)
        return 1
    if ends is not None:
        print(f"the certificate is renewed, until {ends:%Y-%m-%d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
