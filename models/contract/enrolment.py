"""First-boot enrolment and renewal: what travels over HTTPS between a device and the coordinator.

operator --token--> device --token, request, node key--> coordinator --certificate, root, addresses--> device
"""

import base64
import binascii
import secrets
from dataclasses import dataclass, field

from models.contract.bundle import Membership
from models.contract.encoding import build_json, check_digest_text, parse_json
from models.contract.errors import MalformedError
from models.contract.floors import Floors
from models.contract.topics import check_name

CA_PATH, ENROLL_PATH, RENEW_PATH = "/v1/ca.pem", "/v1/enroll", "/v1/renew"
CERTIFICATE_HEADER = "X-Device-Certificate"  # the proxy's, percent-encoded PEM
REQUEST_MAX_BYTES = 16 * 1024
ANSWER_MAX_BYTES = 64 * 1024
_PREFIX = "efl1-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A right to become one device, once.

    Attributes:
        expires_at: Unix time, s.
        ca_digest: SHA-256 of the file of the federation's authority: the server must come from it.
        secret: 32 random bytes, base64; the coordinator keeps a digest of the whole token only.
    """

    device_id: str
    expires_at: int
    ca_digest: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        check_name(self.device_id, "device id")
        check_digest_text(self.ca_digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentRequest:
    """What a machine asks to become a device with.

    Attributes:
        token: As the operator gave it.
        request: PKCS #10, PEM, signed with the key of the certificate that is wanted.
        node_key: Public key of its Flower node, OpenSSH.
    """

    token: str = field(repr=False)
    request: str
    node_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentAnswer:
    """What makes it the device: certificate, PEM, root of trust, JSON, what no release may be below, and addresses."""

    certificate: str
    tuf_root: str
    floors: Floors
    membership: Membership


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalRequest:
    """What a device asks a new certificate with; `request` is signed with the key that it has."""

    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalAnswer:
    """The new certificate, PEM."""

    certificate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why the coordinator gives nothing."""

    error: str


def create_secret() -> str:
    """Return the secret of a new token."""
    return secrets.token_urlsafe(32)


def build_token(token: Token) -> str:
    """Return it as one word that can be typed and copied."""
    return _PREFIX + base64.urlsafe_b64encode(build_json(token)).decode().rstrip("=")


def parse_token(text: str) -> Token:
    """Return the token that `text` is; whether it is worth something only the coordinator knows.

    Raises:
        MalformedError: It is none.
    """
    body = text.strip()
    try:
        if not body.startswith(_PREFIX):
            raise MalformedError(f"a token begins with {_PREFIX}")
        padded = body.removeprefix(_PREFIX) + "=" * (-len(body.removeprefix(_PREFIX)) % 4)
        return parse_json(base64.b64decode(padded, altchars=b"-_", validate=True), Token, max_bytes=1024)
    except (binascii.Error, ValueError, MalformedError) as error:
        raise MalformedError("this is no enrolment token: copy it whole, as fl-server token printed it") from error
