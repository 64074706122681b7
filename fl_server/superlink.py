"""Flower's SuperLink as a child of the coordinator, and the fleet's devices as its nodes."""

import asyncio
import logging
import socket
import time
from collections.abc import Mapping

from fl_server.children import keep_running
from fl_server.config import SuperLinkSettings
from fl_server.directory import Directory
from fl_server.errors import RunError
from fl_server.fleet.roster import Roster
from fl_server.rounds.flower import SessionLostError, register_nodes, unregister_nodes, unregister_others
from fl_server.rounds.superlink_command import superlink_command
from models.contract.settings import SettingsError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
RETRY_S = 0.5
PORT_TIMEOUT_S = 5.0  # a killed coordinator's SuperLink needs a moment to give its port back


class SuperLink:
    """The SuperLink of one coordinator."""

    def __init__(self, settings: SuperLinkSettings, directory: Directory, roster: Roster) -> None:
        self._settings, self._directory, self._roster = settings, directory, roster
        self._registering = asyncio.Lock()

    async def keep_running(self) -> None:
        """Run it, again whenever it ends, until cancelled."""
        command = superlink_command(
            host=self._settings.host,
            port=self._settings.port,
            database_path=self._directory.superlink_dir / "flwr.db",
            ca_path=self._directory.ca_path,
            certificate_path=self._directory.ca_dir / "superlink.pem",
            key_path=self._directory.ca_dir / "superlink.key.pem",
            superexec_secret_path=self._directory.superexec_secret_path,
        )
        await keep_running(
            "superlink",
            command.arguments,
            log_path=self._directory.logs_dir / "superlink.log",
            environment=command.environment,
        )

    async def register_devices(self) -> None:
        """Make every enrolled device a node, and nobody else; waits for a SuperLink that is starting.

        Raises:
            RunError: It does not answer in time.
        """
        async with self._registering:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                members = [device for device in self._roster.list_devices() if device.revoked_at is None]
                keys = {device.device_id: device.public_key for device in members}
                try:
                    nodes = await asyncio.to_thread(self._register, keys)
                    break
                except SessionLostError as error:
                    if time.monotonic() > deadline:
                        raise RunError(f"{error}; its log: {self._directory.logs_dir / 'superlink.log'}") from error
                    await asyncio.sleep(RETRY_S)
            for device in members:
                if device.node_id != nodes[device.device_id]:
                    self._roster.save_node_id(device.device_id, nodes[device.device_id])
                    logger.info("%s is node %d", device.device_id, nodes[device.device_id])

    def _register(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        nodes = register_nodes(self._settings.address, self._directory.ca_path, keys)
        unregister_others(self._settings.address, self._directory.ca_path, keys.values())
        return nodes

    async def unregister_revoked(self) -> None:
        """Exclude the nodes of revoked devices; done again after any interruption, as the roster says who is left.

        Raises:
            RunError: The SuperLink does not answer.
        """
        async with self._registering:
            revoked = {
                device.device_id: device.node_id
                for device in self._roster.list_devices()
                if device.revoked_at is not None and device.node_id is not None
            }
            if revoked:
                await asyncio.to_thread(
                    unregister_nodes, self._settings.address, self._directory.ca_path, revoked.values()
                )
            for device_id, node_id in revoked.items():
                self._roster.save_node_id(device_id, None)
                logger.info("%s is revoked and node %d no more", device_id, node_id)


def check_port_free(settings: SuperLinkSettings) -> None:
    """Raise SettingsError if something else listens where the SuperLink is to."""
    deadline = time.monotonic() + PORT_TIMEOUT_S
    while True:
        try:
            socket.create_server((settings.host, settings.port)).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"superlink.host and superlink.port: cannot listen on {settings.address}: {error.strerror}"
                ) from error
            time.sleep(0.1)
        else:
            return
