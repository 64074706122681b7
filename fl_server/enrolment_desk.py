"""Enrolment and renewal as devices ask for them: over HTTPS through the proxy, answered by the coordinator."""

import logging
import sqlite3
import ssl
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import unquote

from cryptography import x509

from fl_server.authority import Authority, AuthorityError
from fl_server.config import ServerSettings
from fl_server.console.http import Answer, Request
from fl_server.directory import Directory
from fl_server.errors import ServerError
from fl_server.fleet.enrolment import Federation, enroll_by_token, renew_device
from fl_server.fleet.roster import Roster, RosterError
from fl_server.rollout.repository import ReleaseRepository
from models.contract.encoding import build_json, parse_json
from models.contract.enrolment import (
    CERTIFICATE_HEADER,
    ENROLL_PATH,
    RENEW_PATH,
    REQUEST_MAX_BYTES,
    EnrolmentRequest,
    Refusal,
    RenewalAnswer,
    RenewalRequest,
)
from models.contract.errors import ContractError, MalformedError
from models.contract.settings import SettingsError

logger = logging.getLogger(__name__)


class EnrolmentDesk:
    """Decides on one request at a time."""

    def __init__(self, roster: Roster, authority: Authority, load: Callable[[], Federation]) -> None:
        """Prepare; `load` returns what bundles say now."""
        self._roster, self._authority, self._load = roster, authority, load

    def decide(self, request: Request) -> Answer:
        """Return what the request gets: a certificate, or one line that says why not."""
        ways = {ENROLL_PATH: self._enroll, RENEW_PATH: self._renew}
        if request.method != "POST" or request.path not in ways:
            return _refuse(HTTPStatus.NOT_FOUND, "nothing is here")
        try:
            return Answer(status=HTTPStatus.OK, body=build_json(ways[request.path](request)))
        except MalformedError as error:
            return _refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (RosterError, AuthorityError) as error:
            logger.warning("%s: %s", request.path, error)
            return _refuse(HTTPStatus.FORBIDDEN, str(error))
        except (ServerError, ContractError, OSError, sqlite3.Error) as error:
            logger.error("%s: %s", request.path, error)  # noqa: TRY400 - the message says it all
            return _refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the coordinator cannot do this now; try again later")

    def _enroll(self, request: Request) -> object:
        wish = parse_json(request.body, EnrolmentRequest, max_bytes=REQUEST_MAX_BYTES)
        answer = enroll_by_token(self._roster, self._authority, self._load(), wish)
        logger.info("%s has enrolled itself", answer.membership.device_id)
        return answer

    def _renew(self, request: Request) -> object:
        """Renew the certificate in the proxy's header; whoever set it, only its key can have signed the request."""
        wish = parse_json(request.body, RenewalRequest, max_bytes=REQUEST_MAX_BYTES)
        present = self._authority.check_device(unquote(request.headers.get(CERTIFICATE_HEADER.lower(), "")).encode())
        device_id, serial = (
            str(present.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value),
            present.serial_number,
        )
        if not self._roster.has_certificate(device_id, serial):
            raise RosterError(f"device {device_id!r} has no such certificate any more")
        if Authority.is_young(present):
            raise AuthorityError("the certificate is not half over yet; it is renewed later")
        try:
            key = x509.load_pem_x509_csr(wish.request.encode()).public_key()
        except Exception as error:  # as in `issue_from_request`
            raise AuthorityError("the request is no certificate signing request in PEM") from error
        if key != present.public_key():
            raise AuthorityError("the request must be signed with the key of the present certificate")
        logger.info("%s renews its certificate", device_id)
        certificate = renew_device(self._roster, self._authority, device_id, wish.request.encode())
        return RenewalAnswer(certificate=certificate.decode())


def load_federation(settings: ServerSettings, directory: Directory) -> Federation:
    """Return what bundles say."""
    repository = ReleaseRepository(directory)
    return Federation(
        fleet=settings.fleet,
        broker_host=settings.broker.host,
        broker_port=settings.broker.port,
        broker_tls=settings.broker.tls,
        superlink=settings.fleet_address,
        renewal=settings.fleet_address if settings.proxy.used else None,
        ca=directory.ca_path.read_bytes(),
        tuf_root=repository.load_root(),
        floors=repository.build_floors(),
    )


def build_server_context(directory: Directory) -> ssl.SSLContext:
    """Return what the coordinator is to the proxy: the certificate of this machine's servers on the loopback.

    Raises:
        SettingsError: It cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = directory.ca_dir / "superlink.pem"
    try:
        context.load_cert_chain(path, directory.ca_dir / "superlink.key.pem")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from error
    return context


def _refuse(status: HTTPStatus, reason: str) -> Answer:
    return Answer(status=status, body=build_json(Refusal(error=reason)))
