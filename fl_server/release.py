"""From a version to an offer: registers, signs and publishes versions.

What the registry calls champion is what is signed, and what is signed is what is published: both steps may be
repeated at any time, so a kill between two of them is made good by the next one.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fl_server.candidate import Candidates, Verdict, find_released
from fl_server.config import ServerSettings
from fl_server.directory import Directory
from fl_server.errors import ServerError
from fl_server.fleet.mqtt import LinkError
from fl_server.packaging.architecture import Architecture
from fl_server.registry.registry import ModelVersion, Registry
from fl_server.registry.statements import open_statement_key, write_statements
from fl_server.rollout.publisher import Publish, Publisher, list_blobs, load_blob
from fl_server.rollout.records import RolloutRecords
from fl_server.rollout.repository import ReleaseRepository
from fl_server.rollout.waves import Phase, Rollout
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.errors import ContractError
from models.contract.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    FileEntry,
    Lineage,
    ModelManifest,
    parse_manifest,
)
from models.contract.offer import build_offer
from models.contract.privacy import PrivacyStatement
from models.contract.terms import ProbationRules, ReleaseTerms, Role, Split
from models.contract.wave import Requirements

logger = logging.getLogger(__name__)

PUBLISH_ERRORS = (ServerError, ContractError, OSError, sqlite3.Error)  # that a later call may be spared
SPLIT_TAG = "split"  # of a version in the registry: what it does as a challenger
REQUIREMENTS_TAG = "requirements"  # what a device must be to have it


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseResult:
    """What a release brought; the result of its job."""

    model: str
    version: int
    digest: str


class Releases:
    """The way of a version from parameters to the fleet; used on one event loop."""

    def __init__(self, settings: ServerSettings, directory: Directory, publish: Publish) -> None:
        self._directory = directory
        self._candidates = Candidates(settings, directory)
        self._repository = ReleaseRepository(directory)
        self._publisher = Publisher(
            fleet=settings.fleet, record_path=directory.path / "published.json", publish=publish
        )
        self._publishing = asyncio.Lock()
        self.changing = asyncio.Lock()  # held while it is decided what the aliases stand for
        self._expiring: tuple[str, ...] = ()  # roles whose keys are elsewhere, as last logged

    async def release_folder(self, version_dir: Path, split: Split | None = None) -> ModelVersion:
        """Make the version in `version_dir` the champion, or with a split the challenger; `publish` offers it.

        Raises:
            ServerError: It cannot be registered, its graphs cannot be signed here, there is no champion that it can
                be compared with, or a rollout of the model is under way.
        """
        async with self.changing:
            return await asyncio.to_thread(self._release, version_dir, split)

    async def promote(self, model: str, version: int) -> ModelVersion:
        """Make a registered version the champion; `publish` offers it.

        Raises:
            ServerError: There is none, a file of it was changed, or a rollout of the model is under way.
        """
        async with self.changing:
            with Registry(self._directory.registry_dir) as registry:
                promoted = registry.get_model_version(model, version)
                _check_files(promoted)
                self._forget_rollout(model)
                registry.set_registered_model_alias(model, "champion", version)
                return promoted

    def withdraw(self, model: str, version: int) -> ModelVersion:
        """Let this version be the model's challenger no more; `publish` tells. Raises as `promote`."""
        with Registry(self._directory.registry_dir) as registry:
            registry.delete_registered_model_alias(model, "challenger", version=version)
            return registry.get_model_version(model, version)

    async def consider(
        self,
        model: str,
        parameters: Mapping[str, npt.NDArray[np.float32]],
        *,
        lineage: Lineage,
        privacy: PrivacyStatement,
        scratch_dir: Path,
    ) -> Verdict:
        """Package `parameters` and offer them if they beat the champion; a round considered before is not twice.

        Args:
            model: Whose parameters.
            parameters: Arrays by the names of the model's layout.
            lineage: Names the run and round.
            privacy: What the version may claim.
            scratch_dir: Where the candidate is built; gone afterwards.
        """
        candidate = await asyncio.to_thread(  # for minutes: whoever changes a release does not wait for it
            self._candidates.prepare, model, parameters, lineage=lineage, privacy=privacy, scratch_dir=scratch_dir
        )
        async with self.changing:
            verdict = await asyncio.to_thread(self._candidates.decide, candidate, self._find_obstacle(model))
        try:
            await self.publish()
        except PUBLISH_ERRORS as error:  # the round is done, and the coordinator publishes again within a minute
            logger.error("%s is not published yet: %s", model, error)  # noqa: TRY400
        return verdict

    async def publish(self, *, again: bool = False) -> bool:
        """Sign the champions and let the broker hold them; what it did not take, the next call sends.

        Args:
            again: Send what was sent before too: the broker may have lost it.

        Returns:
            Whether the broker took it; what is damaged here is logged, and keeps nothing else from it.
        """
        async with self._publishing:
            offer, blobs, is_whole = await asyncio.to_thread(self._sign)
            try:
                publish = self._publisher.republish if again else self._publisher.publish
                await publish(offer, blobs, clears=is_whole)
            except LinkError as error:
                logger.warning("not published: %s", error)
                return False
            return True

    def load_champion(self, model: str) -> tuple[ModelVersion, Architecture]:
        """Return the champion and the architecture it was packaged from.

        Raises:
            ServerError: There is no champion, or its architecture is not here.
        """
        return self._candidates.load_champion(model)

    def register(self, version_dir: Path) -> ModelVersion:
        """Register the version in `version_dir` and sign its graphs; nobody is offered it. Raises ServerError."""
        with Registry(self._directory.registry_dir) as registry:
            version = registry.create_model_version(version_dir)
        self._repository.sign_graphs(_list_graphs(_check_files(version)), now=datetime.now(UTC))
        return version

    def save_requirements(self, version: ModelVersion, requirements: Requirements) -> None:
        """Keep what a device must be to have this version, as long as it is released."""
        tag = build_json(requirements).decode()
        with Registry(self._directory.registry_dir) as registry:
            registry.set_model_version_tag(version.model, version.version, REQUIREMENTS_TAG, tag)

    def restore(self, rollout: Rollout) -> None:
        """Let the aliases stand for what they stood for before a rollout that was rolled back; once more does nothing.

        Call it while `changing` is held.
        """
        if rollout.phase is not Phase.ROLLED_BACK:
            return
        with Registry(self._directory.registry_dir) as registry:
            champion = find_released(registry, rollout.model).get("champion")
            if champion is not None and champion.version == rollout.version:
                registry.restore_registered_model_aliases(
                    rollout.model, champion=rollout.before, previous=rollout.previous
                )

    def _release(self, version_dir: Path, split: Split | None) -> ModelVersion:
        version = self.register(version_dir)
        with Registry(self._directory.registry_dir) as registry:
            if split is not None:
                champion = registry.get_model_version_by_alias(version.model, "champion")
                _check_comparable(version.load_manifest(), champion)
                if obstacle := self._find_obstacle(version.model):
                    raise ServerError(obstacle)
                tag = build_json(split).decode()
                registry.set_model_version_tag(version.model, version.version, SPLIT_TAG, tag)
            else:
                self._forget_rollout(version.model)
            alias: Role = "champion" if split is None else "challenger"
            self.save_requirements(version, Requirements())
            registry.set_registered_model_alias(version.model, alias, version.version)
        return version

    def _forget_rollout(self, model: str) -> None:
        """Forget a rollout that has ended; raises ServerError if it has not."""
        if obstacle := self._find_obstacle(model):
            raise ServerError(obstacle)
        with RolloutRecords(self._directory.database_path) as records:
            if (rollout := records.find(model)) is not None:
                self.restore(rollout)
            records.forget(model)

    def _find_obstacle(self, model: str) -> str | None:
        with RolloutRecords(self._directory.database_path) as records:
            rollout = records.find(model)
        return None if rollout is None else rollout.obstacle

    def _sign(self) -> tuple[bytes, dict[str, Path | bytes], bool]:
        """Sign what the registry calls champion; return the offer, the blobs it leads to, and whether these are all."""
        now, is_whole = datetime.now(UTC), True
        pem = self._repository.build_coordinator_pem()
        blobs: dict[str, Path | bytes] = {build_digest(pem): pem}
        with (
            Registry(self._directory.registry_dir) as registry,
            RolloutRecords(self._directory.database_path) as records,
        ):
            for model in registry.search_registered_models():
                released = find_released(registry, model)
                sound = {alias: version for alias, version in released.items() if _is_sound(version)}
                manifests = {alias: version.load_manifest_bytes() for alias, version in sound.items()}
                rollout = records.find(model)  # after the aliases: one that begins or ends just now is for nobody new
                terms = {alias: _load_terms(registry, alias, version, rollout) for alias, version in sound.items()}
                self._repository.set_release(model, manifests, now=now, terms=terms, kept=released.keys() - sound)
                self._write_statements(sound.values())
                for version in sound.values():
                    blobs |= list_blobs(version.directory)
                is_whole = is_whole and sound == released
        expiring = self._repository.refresh_expiring(now)
        if expiring != self._expiring:
            logger.warning(
                "metadata expires soon, sign it where its key is: %s", ", ".join(expiring) or "none any more"
            )
            self._expiring = expiring
        return build_offer(self._repository.load_metadata()), blobs, is_whole

    def _write_statements(self, versions: Iterable[ModelVersion]) -> None:
        """Let every version have its statements; devices fetch none of them, so a full disk holds back no release."""
        paths = self._directory.statement_key_path, self._directory.statement_public_key_path
        try:
            key = open_statement_key(*paths)
            for version in versions:
                write_statements(version, key)
        except (ServerError, OSError) as error:
            logger.error("statements are not written: %s", error)  # noqa: TRY400


def sign_graphs(directory: Directory, version_dir: Path, keys: Sequence[Path]) -> None:
    """Sign the graphs of the version in `version_dir` with the offline key, which may be in one of the folders `keys`.

    Raises:
        ServerError: The key is in none of them.
    """
    manifest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes())
    ReleaseRepository(directory, keys).sign_graphs(_list_graphs(manifest), now=datetime.now(UTC))


def _list_graphs(manifest: ModelManifest) -> dict[str, FileEntry]:
    return {name: manifest.files[name] for name in GRAPH_NAMES if name in manifest.files}


def _check_files(version: ModelVersion) -> ModelManifest:
    """Return the manifest; raises ServerError if a device could not fetch the version, OSError if unreadable."""
    manifest = version.load_manifest()
    for digest, path in list_blobs(version.directory).items():
        load_blob(digest, path)
    return manifest


def _is_sound(version: ModelVersion) -> bool:
    """Return whether its manifest can be read; one that cannot must not let the metadata of all others expire."""
    try:
        version.load_manifest()
    except (ServerError, ContractError, OSError) as error:
        logger.error("%s version %d stays as it was signed: %s", version.model, version.version, error)  # noqa: TRY400
        return False
    return True


def _load_terms(registry: Registry, alias: Role, version: ModelVersion, rollout: Rollout | None) -> ReleaseTerms:
    tags = registry.get_model_version_tags(version.model, version.version)
    is_rolled_out = alias == "champion" and rollout is not None and rollout.version == version.version
    return ReleaseTerms(
        role=alias,
        version=version.version,
        split=parse_json(tags[SPLIT_TAG].encode(), Split) if alias == "challenger" else None,
        requirements=parse_json(tags.get(REQUIREMENTS_TAG, "{}").encode(), Requirements),
        wave=rollout.signed_wave if rollout is not None and is_rolled_out else None,
        probation=rollout.plan.probation if rollout is not None and is_rolled_out else ProbationRules(),
    )


def _check_comparable(challenger: ModelManifest, champion: ModelVersion) -> None:
    what = f"{challenger.model} version {challenger.version} cannot challenge version {champion.version}"
    if challenger.version == champion.version:
        raise ServerError(f"{what}: it is the champion itself")
    other = champion.load_manifest()
    if (challenger.inputs, challenger.outputs) != (other.inputs, other.outputs):
        raise ServerError(f"{what}: it takes or gives other tensors")
