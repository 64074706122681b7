"""Who may ask what: nobody's web page anything, and only the owner's programs what writes or tells of the owner."""

import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

from edge_agent.errors import RequestError
from models.contract.files import save_atomically
from models.contract.settings import SettingsError

TOKEN_NAME = "api.token"  # noqa: S105 - of its file
_TOKEN_BYTES = 32
_TOKEN_MODE = 0o600


class Guard:
    """Checks what arrives over TCP; the Unix socket has its mode."""

    def __init__(self, host: str, token: str | None) -> None:
        """Prepare the checks.

        Args:
            host: The configured address, accepted in `Host` beside the loopback's names.
            token: What a bearer must know; None leaves the owner's calls to the Unix socket.
        """
        self._hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host.lower(), f"[{host.lower()}]"})
        self._welcome: set[bytes] = set()  # `Host` as it has been found good; one port a name is the rule
        self._bearer = None if token is None else f"bearer {token}".encode()

    @property
    def has_token(self) -> bool:
        """Whether anybody over TCP could pass for the owner."""
        return self._bearer is not None

    def check_sender(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse what a web page sends: it carries an Origin, or, after DNS rebinding, a foreign Host."""
        check_origin(headers)
        host = headers.get(b"host", b"")
        if host in self._welcome:
            return
        if _strip_port(host.decode("latin-1")) not in self._hosts:
            raise RequestError(f"header Host: expected one of {', '.join(sorted(self._hosts))}", status=403)
        if len(self._welcome) < 16:
            self._welcome.add(host)

    def check_owner(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse who does not know the token."""
        if self._bearer is None:
            raise RequestError("this answers on the Unix socket only", status=403)
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(scheme.lower() + b" " + token.strip(), self._bearer):
            raise RequestError(
                "this answers on the Unix socket, and over TCP to the bearer of the token in the state directory",
                status=401,
            )


def check_origin(headers: Mapping[bytes, bytes]) -> None:
    """Refuse what a web page sends without more ado."""
    if b"origin" in headers:
        raise RequestError("requests of web pages (header Origin) are refused", status=403)


def load_token(path: Path) -> str:
    """Return the token in the file at `path`, which only its owner can read; made if it is not there.

    Raises:
        SettingsError: The file cannot be read or written, others may read it, or there is no token in it.
    """
    try:
        if not path.exists():
            save_atomically(path, f"{secrets.token_urlsafe(_TOKEN_BYTES)}\n".encode(), mode=_TOKEN_MODE)
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"{path}: others may read this token; remove it, and another is made")
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if len(token) < _TOKEN_BYTES:
        raise SettingsError(f"{path}: expected a token of {_TOKEN_BYTES} characters or more; remove it for another")
    return token


def _strip_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return name.lower() if separator and port.isdecimal() else host.lower()
