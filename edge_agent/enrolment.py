"""`edge-agent enroll`: this machine makes itself a device with a token of the operator; its keys are born here.

authority's certificate, by the digest in the token -> connection to a server that it vouches for -> token sent
"""

import ssl
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from edge_agent.errors import StalledError, TransientError
from models.contract.bundle import (
    CA_NAME,
    CERT_NAME,
    CONFIG_NAME,
    KEY_NAME,
    NODE_KEY_NAME,
    ROOT_NAME,
    build_config,
    is_free,
    save_bundle,
)
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.enrolment import (
    ANSWER_MAX_BYTES,
    CA_PATH,
    ENROLL_PATH,
    EnrolmentAnswer,
    EnrolmentRequest,
    Refusal,
    parse_token,
)
from models.contract.errors import MalformedError
from models.contract.floors import FLOORS_NAME

_Document = TypeVar("_Document")

TIMEOUT_S = 30.0  # of each step: connecting, sending, waiting for the answer
DEFAULT_PORT = 9444


def enroll(server: str, token_text: str, out_dir: Path) -> str:
    """Write the bundle of a new device to `out_dir`, whole or not at all, and return the device's id.

    Args:
        server: [https://]HOST[:PORT] of the coordinator's proxy.
        token_text: As `fl-server token` printed it.
        out_dir: New or empty; holds private keys then.

    Raises:
        MalformedError: It is no token.
        StalledError: The server is another than the token's, or refuses; or `out_dir` holds something.
        TransientError: The server does not answer.
    """
    token, host = parse_token(token_text), parse_server(server)
    if not is_free(out_dir):
        raise StalledError(f"{out_dir} is not an empty folder; a bundle gets one of its own")
    ca = _fetch_ca(host, token.ca_digest)
    key, node_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
    wish = EnrolmentRequest(
        token=token_text.strip(),
        request=build_request(token.device_id, key).decode(),
        node_key=node_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
    )
    answer = ask(host, ENROLL_PATH, wish, EnrolmentAnswer, ssl.create_default_context(cadata=ca.decode("ascii")))
    certificate = answer.certificate.encode()
    check_certificate(certificate, key.public_key(), ca)
    if answer.membership.device_id != token.device_id:
        raise StalledError(f"{server} answered for another device, {answer.membership.device_id}")
    files = {
        CONFIG_NAME: build_config(answer.membership),
        ROOT_NAME: answer.tuf_root.encode(),
        FLOORS_NAME: build_json(answer.floors),
        CA_NAME: ca,
        CERT_NAME: certificate,
        KEY_NAME: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        NODE_KEY_NAME: node_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    }
    try:
        save_bundle(out_dir, files)
    except OSError as error:
        raise StalledError(
            f"{error.filename or out_dir}: {error.strerror}; the token is spent, ask for another made with --again"
        ) from error
    return token.device_id


def parse_server(text: str) -> tuple[str, int]:
    """Return host and port of [https://]HOST[:PORT]; raises StalledError."""
    host, _, port = text.removeprefix("https://").rstrip("/").partition(":")
    if not host or "/" in host or not (port or str(DEFAULT_PORT)).isdecimal():
        raise StalledError(f"server {text!r:.80} is not HOST:PORT")
    return host, int(port or DEFAULT_PORT)


def build_request(device_id: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a request, PKCS #10 in PEM, for a certificate of `key`."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device_id)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def check_certificate(certificate: bytes, key: ec.EllipticCurvePublicKey, ca: bytes) -> x509.Certificate:
    """Return the certificate, PEM, if it is the authority's word for `key`; raises StalledError."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
        parsed.verify_directly_issued_by(x509.load_pem_x509_certificates(ca)[0])
    except Exception as error:  # the library raises its own, ValueError, TypeError and others
        raise StalledError("the server answered with no certificate of its authority") from error
    if parsed.public_key() != key:
        raise StalledError("the server answered with a certificate for another key")
    return parsed


def ask(address: tuple[str, int], path: str, wish: object, kind: type[_Document], context: ssl.SSLContext) -> _Document:
    """Return what the server answers to `wish`.

    Raises:
        StalledError: It refuses, or its certificate is not what `context` asks for.
        TransientError: It does not answer, or cannot now.
    """
    status, body = _exchange(address, "POST", path, context, build_json(wish))
    try:
        if status == 200:
            return parse_json(body, kind, max_bytes=ANSWER_MAX_BYTES)
        reason = parse_json(body, Refusal).error
    except MalformedError as error:
        raise TransientError(f"{address[0]}:{address[1]} answered HTTP {status}") from error
    raise (TransientError if status >= 500 else StalledError)(reason)


def _fetch_ca(address: tuple[str, int], digest: str) -> bytes:
    """Return the authority's certificate; over a connection that proves nothing, since the digest does."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    status, body = _exchange(address, "GET", CA_PATH, context, None)
    if status != 200 or build_digest(body) != digest:
        raise StalledError(
            f"{address[0]}:{address[1]} is not the server that this token is for: its authority is another"
        )
    return body


def _exchange(
    address: tuple[str, int], method: str, path: str, context: ssl.SSLContext, body: bytes | None
) -> tuple[int, bytes]:
    connection = HTTPSConnection(*address, timeout=TIMEOUT_S, context=context)
    where = f"{address[0]}:{address[1]}"
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        data = response.read(ANSWER_MAX_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise StalledError(f"{where} is not who it should be: {error.verify_message}") from error
    except (OSError, HTTPException) as error:
        raise TransientError(f"{where} does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    return response.status, data
