"""What an offer says to this device: verified, the order key taken from it, and the release to follow chosen."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from edge_agent.errors import AgentError, TransientError, UnfitError
from edge_agent.updates.blobs import BlobStore
from edge_agent.updates.download import OnEvent
from edge_agent.updates.following import Release, choose_release, find_release
from edge_agent.updates.order_key import update_order_key
from edge_agent.updates.settings import UpdaterSettings
from edge_agent.updates.targets import SignedTargets
from models.contract.errors import ContractError
from models.contract.messages import EventKind

OpenOffer: TypeAlias = Callable[[bytes], SignedTargets]

_REFUSALS_MAX = 64  # remembered; then some are told again


class OfferDesk:
    """Reads offers; what it cannot use it reports.

    Attributes:
        payload: The newest offer that was not refused: what a retry starts from.
    """

    def __init__(
        self,
        settings: UpdaterSettings,
        *,
        open_offer: OpenOffer,
        keys: BlobStore,
        on_event: OnEvent,
        try_later: Callable[[], None],
    ) -> None:
        """Prepare it.

        Args:
            settings: What this updater is told.
            open_offer: Verifies an offer and trusts it from then on; raises AgentError or OSError. On a worker thread.
            keys: For the order key alone.
            on_event: Is told what cannot be used.
            try_later: Has `payload` handled again.
        """
        self.payload = b""
        self._settings, self._open_offer, self._keys = settings, open_offer, keys
        self._on_event, self._try_later = on_event, try_later
        self._refusals: set[str] = set()  # told already: an offer comes again and again

    async def open(self, payload: bytes) -> SignedTargets | None:
        """Return what a genuine offer signs, None if it is none, or not for now."""
        try:
            targets = await asyncio.to_thread(self._open_offer, payload)
        except (AgentError, OSError) as error:
            self._on_event(EventKind.FAILED, str(error), None)
            if isinstance(error, TransientError):
                self.payload = payload
                self._try_later()
            return None
        self.payload = payload
        return targets

    async def update_key(self, targets: SignedTargets) -> None:
        """Bring the order key to what `targets` sign."""
        path, deadline_s = self._settings.order_key_path, self._settings.deadline_s
        try:
            await update_order_key(path, targets, blobs=self._keys, deadline_s=deadline_s)
        except (AgentError, OSError) as error:
            self._on_event(EventKind.FAILED, f"coordinator key: {error}", None)
            self._try_later()

    def choose(self, targets: SignedTargets, active: str | None) -> Release | None:
        """Return the release to follow, None to stay with what runs, which has the digest `active`."""
        settings = self._settings
        find = partial(find_release, targets, settings.model)
        try:
            return choose_release(find, device_id=settings.device_id, traits=settings.traits, active=active)
        except (AgentError, ContractError) as error:
            self.refuse(str(error), error.version if isinstance(error, UnfitError) else None)
            return None

    def refuse(self, reason: str, version: int | None) -> None:
        """Say once why a release is not followed."""
        if reason not in self._refusals:
            self._refusals = {*self._refusals, reason} if len(self._refusals) < _REFUSALS_MAX else {reason}
            self._on_event(EventKind.FAILED, reason, version)
