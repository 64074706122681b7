"""Keeps revoked devices out of the broker: what they may connect with, and what they have open.

    revoked -list of certificates, SIGHUP-> the broker takes no new connection
            -the coordinator connects as the device-> the one that was open ends
            -GRACE_S later-> nothing is left that had connected but not said yet who it is

mosquitto reads the list again on SIGHUP, but leaves alone whoever is connected already.
"""

import asyncio
import logging
import signal
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from fl_server.authority import Authority, save_secret
from fl_server.config import BrokerSettings
from fl_server.errors import ServerError
from fl_server.fleet.mqtt import LinkError, end_session
from fl_server.fleet.roster import Roster
from models.contract.identity import Identity

logger = logging.getLogger(__name__)

GRACE_S = 100.0  # mosquitto gives a connection that has not said who it is 90 s


class Lockout:
    """Tells servers which certificates are revoked, and ends the sessions of who had them."""

    def __init__(
        self, settings: BrokerSettings, roster: Roster, authority: Authority, *, servers: Sequence[Path], ca_path: Path
    ) -> None:
        """Prepare it.

        Args:
            settings: Of the broker.
            roster: Says who is revoked.
            authority: Signs the list.
            servers: Files with the process ids of servers that read the list again on SIGHUP.
            ca_path: The authority that the broker's certificate comes from.
        """
        self._settings, self._roster, self._authority = settings, roster, authority
        self._servers, self._ca_path = servers, ca_path
        self._told: bytes | None = None  # the list that the servers were last told of
        self._since: dict[int, float] = {}  # when the servers knew of a certificate, by its serial, monotonic s

    async def keep_out(self) -> None:
        """Look after it until cancelled."""
        while True:
            try:
                await self._look_after()
            except (ServerError, OSError, sqlite3.Error) as error:
                logger.warning("revoked devices: %s; tried again in %g s", error, self._settings.revocation_interval_s)
            await asyncio.sleep(self._settings.revocation_interval_s)

    async def _look_after(self) -> None:
        revoked = self._roster.list_revoked_certificates()
        serials = [certificate.serial for certificate in revoked]
        if not self._authority.is_crl_current(serials):
            self._authority.save_crl(serials)
        crl = self._authority.crl_path.read_bytes()
        if crl != self._told:
            answers = [_hang_up(path) for path in self._servers]  # every one, whatever the others' answer
            self._told = crl if all(answers) else None
        if self._settings.tls:
            pending: dict[str, list[int]] = {}
            for item in revoked:
                if not item.is_shut_out:
                    pending.setdefault(item.device_id, []).append(item.serial)
            for device_id, waiting in pending.items():
                await self._shut_out(device_id, waiting, is_told=crl == self._told)

    async def _shut_out(self, device_id: str, serials: Sequence[int], *, is_told: bool) -> None:
        try:
            await asyncio.to_thread(self._end_session, device_id)
        except LinkError as error:
            logger.warning("%s is revoked: %s", device_id, error)
            return
        if not is_told:
            return
        now = time.monotonic()
        over = [serial for serial in serials if now - self._since.setdefault(serial, now) > GRACE_S]
        if over:
            self._roster.save_shut_out(over)
            for serial in over:
                del self._since[serial]
            logger.info("%s is revoked, and shut out of the broker", device_id)

    def _end_session(self, device_id: str) -> None:
        certificate, key = self._authority.issue_farewell(device_id)
        with tempfile.TemporaryDirectory() as folder:
            cert_path, key_path = Path(folder) / "cert.pem", Path(folder) / "key.pem"
            cert_path.write_bytes(certificate)
            save_secret(key_path, key)
            identity = Identity(ca_path=self._ca_path, cert_path=cert_path, key_path=key_path)
            end_session(self._settings.host, self._settings.port, client_id=device_id, identity=identity)


def _hang_up(path: Path) -> bool:
    """Send SIGHUP to the server whose process id is in the file `path`, if it runs; False if that is not allowed."""
    try:
        process = psutil.Process(int(path.read_text()))
        if process.name() == path.stem:  # else the file is from before a restart, and the number is another's now
            process.send_signal(signal.SIGHUP)
            return True
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        pass
    except (OSError, psutil.AccessDenied) as error:
        logger.warning("%s was not told of revoked devices, send it SIGHUP: %s", path.stem, error)
        return False
    logger.info("%s does not run here: it reads who is revoked when it starts", path.stem)
    return True
