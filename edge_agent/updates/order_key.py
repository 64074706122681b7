"""The verified key that signs orders to devices: saved when an offer brings it, and replaced when one brings another."""

import asyncio
from pathlib import Path

from edge_agent.errors import TransientError
from edge_agent.updates.blobs import BlobStore
from edge_agent.updates.targets import SignedTargets
from models.contract.encoding import build_digest
from models.contract.files import save_atomically
from models.contract.manifest import FileEntry
from models.contract.offer import COORDINATOR_KEY_TARGET


async def update_order_key(path: Path, targets: SignedTargets, *, blobs: BlobStore, deadline_s: float) -> None:
    """Bring the key at `path` to what `targets` sign, if they sign one.

    Raises:
        AgentError: It is signed without a usable digest, or did not come whole within `deadline_s`.
        OSError: The disk does not take it.
    """
    entry = targets.find_target(COORDINATOR_KEY_TARGET)
    if entry is None or _is_key(path, entry):
        return
    try:
        async with asyncio.timeout(deadline_s):
            await blobs.fetch(entry)
    except TimeoutError as error:
        raise TransientError("it did not come in time") from error
    save_atomically(path, b"".join(blobs.read(entry)))
    blobs.keep_only(())


def _is_key(path: Path, entry: FileEntry) -> bool:
    return path.exists() and build_digest(path.read_bytes()) == entry.digest
