"""Who one of ours is over TLS: the files, and the connection that they make."""

import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A certificate with its key, and the authority that the other side must come from; all PEM.

    Attributes:
        ca_path: The federation's certificate authority.
        cert_path: Its common name is who this is.
        key_path: The certificate's key.
    """

    ca_path: Path
    cert_path: Path
    key_path: Path

    def build_context(self) -> ssl.SSLContext:
        """Return what a client connects with: TLS 1.2 or later, both certificates shown, the server's name checked.

        Raises:
            OSError: A file cannot be read or used; the message names it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(self.ca_path)
        except ssl.SSLError as error:
            raise OSError(f"{self.ca_path} holds no certificate") from error
        except OSError as error:
            raise OSError(f"{self.ca_path}: {error.strerror}") from error
        try:
            context.load_cert_chain(self.cert_path, self.key_path)
        except ssl.SSLError as error:
            raise OSError(f"{self.cert_path} and {self.key_path} are no certificate and its key") from error
        except OSError as error:
            raise OSError(f"{self.cert_path} or {self.key_path}: {error.strerror}") from error
        return context
