"""What an offer says, once python-tuf has verified it; runs in the process of `verifier.py`, for tuf takes memory.

ngclient works on a folder that is thrown away. What it came to trust is kept as one file, replaced
atomically once everything in an offer has verified, so that a refused offer changes nothing.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.ngclient import FetcherInterface, Updater

from edge_agent.errors import StalledError
from edge_agent.updates.floors import raise_floors
from edge_agent.updates.targets import SignedTarget, SignedTargets
from models.contract.encoding import build_json, parse_json
from models.contract.errors import ContractError
from models.contract.files import save_atomically
from models.contract.offer import COORDINATOR_KEY_TARGET, OFFER_MAX_BYTES, build_graph_target, parse_offer

logger = logging.getLogger(__name__)

OFFER_URL = "offer:/"
_TRUSTED_NAME = "trusted.json"
_ROOTS_NAME = "root_history"  # ngclient's folder of them
_TRUSTED_MAX_BYTES = 4 * OFFER_MAX_BYTES  # it was verified before it was written; JSON escapes may lengthen it
_NO_GRAPH = build_graph_target("0" * 64, "none")


class OfferFetcher(FetcherInterface):
    """Serves ngclient from a parsed offer; a true 404 for what the offer does not hold."""

    def __init__(self, metadata: Mapping[str, bytes]) -> None:
        self._metadata = metadata

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self._metadata.get(url.removeprefix(OFFER_URL))
        if data is None:
            raise DownloadHTTPError(f"the offer does not hold {url.removeprefix(OFFER_URL)}", 404)
        return iter((data,))


def open_offer(payload: bytes, *, root: bytes, trust_dir: Path, told: Sequence[Path] = ()) -> SignedTargets:
    """Return what `payload` offers, and trust it from now on.

    Args:
        payload: The retained offer.
        root: The root of trust from enrolment.
        trust_dir: Where what is trusted is kept; only newer offers are accepted after this one. Floors lie beside it.
        told: Files of floors that the coordinator told.

    Raises:
        StalledError: Not a whole, genuine, fresh offer of this fleet; trust is unchanged but for a newer root.
    """
    try:
        metadata = parse_offer(payload)
    except ContractError as error:
        raise StalledError(f"offer refused: {error}") from error
    scratch_dir = trust_dir / "scratch"
    trust_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch_dir, ignore_errors=True)  # left by a kill
    _load_trusted(trust_dir, scratch_dir)
    try:
        updater = Updater(str(scratch_dir), OFFER_URL, fetcher=OfferFetcher(metadata), bootstrap=root)
        updater.refresh()
        signed = dict(_list_signed(updater, metadata))
        floors_path = trust_dir.with_name(f"{trust_dir.name}-floors.json")
        raise_floors(floors_path, scratch_dir, told=told, now=datetime.now(UTC))
    except (RepositoryError, DownloadError) as error:
        _keep_roots(trust_dir, scratch_dir)
        raise StalledError(f"offer refused: {error}") from error
    _save_trusted(trust_dir, scratch_dir)
    shutil.rmtree(scratch_dir, ignore_errors=True)
    return SignedTargets(signed)


def _list_signed(updater: Updater, metadata: Mapping[str, bytes]) -> Iterator[tuple[str, SignedTarget]]:
    """Yield every target that verifies; the names come from documents that need not."""
    for path in (COORDINATOR_KEY_TARGET, _NO_GRAPH):  # loads both delegated roles, whatever the names
        updater.get_targetinfo(path)
    for path in {path for data in metadata.values() for path in _list_names(data)}:
        if (target := updater.get_targetinfo(path)) is not None:
            yield path, (target.hashes.get("sha256", ""), target.length, target.custom)


def _list_names(data: bytes) -> list[str]:
    try:
        return list(json.loads(data)["signed"]["targets"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _load_trusted(trust_dir: Path, scratch_dir: Path) -> None:
    (scratch_dir / _ROOTS_NAME).mkdir(parents=True)
    for name, text in _read_trusted(trust_dir).items():
        (scratch_dir / name).write_text(text, encoding="utf-8")


def _read_trusted(trust_dir: Path) -> dict[str, str]:
    try:
        data = (trust_dir / _TRUSTED_NAME).read_bytes()
        return parse_json(data, dict[str, str], max_bytes=_TRUSTED_MAX_BYTES)
    except FileNotFoundError:
        return {}
    except ContractError as error:  # a flipped bit: the root from enrolment still holds
        logger.warning("%s is unreadable and starts anew: %s", trust_dir / _TRUSTED_NAME, error)
        return {}


def _save_trusted(trust_dir: Path, scratch_dir: Path) -> None:
    save_atomically(trust_dir / _TRUSTED_NAME, build_json(_collect(scratch_dir)))


def _keep_roots(trust_dir: Path, scratch_dir: Path) -> None:
    """Trust a newer root even if the rest of its offer is refused: the keys that it replaced may be stolen ones."""
    before = _read_trusted(trust_dir)
    roots = {name: text for name, text in _collect(scratch_dir).items() if name.startswith(_ROOTS_NAME)}
    if not roots.items() <= before.items():
        save_atomically(trust_dir / _TRUSTED_NAME, build_json(before | roots))


def _collect(scratch_dir: Path) -> dict[str, str]:
    paths = [path for path in scratch_dir.rglob("*.json") if not path.is_symlink()]
    return {path.relative_to(scratch_dir).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}
