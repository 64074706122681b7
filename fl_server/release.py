"""From parameters to an offer: packages, measures, registers, signs and publishes versions.

What the registry calls champion is what is signed, and what is signed is what is published: both steps may be
repeated at any time, so a kill between two of them is made good by the next one.
"""

import asyncio
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from fl_server.config import ModelSettings, ServerSettings, resolve_definition
from fl_server.directory import Directory
from fl_server.errors import RunError, ServerError
from fl_server.evaluation.evaluate import measure_quality
from fl_server.evaluation.gate import GateRules, decide_promotion
from fl_server.evaluation.metrics import METRICS, MetricFunction
from fl_server.fleet.mqtt import LinkError
from fl_server.held_out import load_held_out
from fl_server.packaging.architecture import Architecture, load_architecture
from fl_server.packaging.definitions import load_definition
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.precision import StrayingError
from fl_server.packaging.tflite import build_exporter
from fl_server.registry.registry import ModelVersion, Registry, RegistryError
from fl_server.registry.statements import open_statement_key, write_statements
from fl_server.rollout.publisher import Publish, Publisher, count_pushed_bytes, list_blobs, load_blob
from fl_server.rollout.repository import ReleaseRepository
from models.contract.encoding import build_digest, build_json, parse_json
from models.contract.errors import ContractError
from models.contract.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    FileEntry,
    Lineage,
    ModelManifest,
    Quality,
    build_manifest,
    parse_manifest,
)
from models.contract.offer import build_offer
from models.contract.privacy import PrivacyStatement
from models.contract.terms import Role, Split

logger = logging.getLogger(__name__)

PUBLISH_ERRORS = (ServerError, ContractError, OSError, sqlite3.Error)  # that a later call may be spared
SPLIT_TAG = "split"  # of a version in the registry: what it does as a challenger


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a candidate.

    Attributes:
        version: Its number, if it became the champion.
        value: Of the metric, on the server's held-out data.
        bytes_pushed: Bytes a device on the champion before it fetches.
        reason: The gate's.
    """

    version: int | None
    metric: str
    value: Decimal
    bytes_pushed: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseResult:
    """What a release brought; the result of its job."""

    model: str
    version: int
    digest: str


class Releases:
    """The way of a version from parameters to the fleet; used on one event loop."""

    def __init__(self, settings: ServerSettings, directory: Directory, publish: Publish) -> None:
        self._settings, self._directory = settings, directory
        self._repository = ReleaseRepository(directory)
        self._publisher = Publisher(
            fleet=settings.fleet, record_path=directory.path / "published.json", publish=publish
        )
        self._publishing = asyncio.Lock()
        self._expiring: tuple[str, ...] = ()  # roles whose keys are elsewhere, as last logged

    async def release_folder(self, version_dir: Path, split: Split | None = None) -> ModelVersion:
        """Make the version in `version_dir` the champion, or with a split the challenger; `publish` offers it.

        Raises:
            ServerError: It cannot be registered, its graphs cannot be signed here, or there is no champion that it
                can be compared with.
        """
        return await asyncio.to_thread(self._register, version_dir, split)

    def promote(self, model: str, version: int) -> ModelVersion:
        """Make a registered version the champion; `publish` offers it.

        Raises:
            ServerError: There is none, or a file of it was changed.
        """
        with Registry(self._directory.registry_dir) as registry:
            promoted = registry.get_model_version(model, version)
            _check_files(promoted)
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
        verdict = await asyncio.to_thread(self._consider, model, parameters, lineage, privacy, scratch_dir)
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
        with Registry(self._directory.registry_dir) as registry:
            champion = registry.get_model_version_by_alias(model, "champion")
        architecture = load_architecture(self._directory.architectures_dir / model)
        _check_graphs(champion.load_manifest(), architecture)
        return champion, architecture

    def _register(self, version_dir: Path, split: Split | None) -> ModelVersion:
        with Registry(self._directory.registry_dir) as registry:
            version = registry.create_model_version(version_dir)
            manifest = _check_files(version)
            if split is not None:
                _check_comparable(manifest, registry.get_model_version_by_alias(version.model, "champion"))
                tag = build_json(split).decode()
                registry.set_model_version_tag(version.model, version.version, SPLIT_TAG, tag)
            self._repository.sign_graphs(_list_graphs(manifest), now=datetime.now(UTC))
            alias: Role = "champion" if split is None else "challenger"
            registry.set_registered_model_alias(version.model, alias, version.version)
        return version

    def _consider(
        self,
        model: str,
        parameters: Mapping[str, npt.NDArray[np.float32]],
        lineage: Lineage,
        privacy: PrivacyStatement,
        scratch_dir: Path,
    ) -> Verdict:
        champion, architecture = self.load_champion(model)
        with Registry(self._directory.registry_dir) as registry:
            known = registry.search_model_versions(model, run=lineage.run, round=lineage.round)
            if known:  # registered, then the coordinator was killed
                if champion.version < known[0].version:
                    registry.set_registered_model_alias(model, "champion", known[0].version)
                return _build_verdict(known[0].load_manifest(), known[0].version, None, "released before a restart")
            shutil.rmtree(scratch_dir, ignore_errors=True)
            try:
                manifest = package_version(
                    architecture,
                    parameters=parameters,
                    version=registry.get_next_version(model),
                    calibration=self._load_calibration(model, architecture),
                    tools=self._build_tools(model, architecture, find_released(registry, model)),
                    lineage=lineage,
                    privacy=privacy,
                    out_dir=scratch_dir,
                )
            except StrayingError as error:  # this round's parameters; those of the next one may do
                return _refuse(error)
            before = champion.load_manifest()
            assert manifest.quality is not None
            decision = decide_promotion(manifest.quality, before.quality, GateRules())
            if decision.promote:
                registry.create_model_version(scratch_dir)
                registry.set_registered_model_alias(model, "champion", manifest.version)
            shutil.rmtree(scratch_dir)
            return _build_verdict(manifest, manifest.version if decision.promote else None, before, decision.reason)

    def _sign(self) -> tuple[bytes, dict[str, Path | bytes], bool]:
        """Sign what the registry calls champion; return the offer, the blobs it leads to, and whether these are all."""
        now, is_whole = datetime.now(UTC), True
        pem = self._repository.build_coordinator_pem()
        blobs: dict[str, Path | bytes] = {build_digest(pem): pem}
        with Registry(self._directory.registry_dir) as registry:
            for model in registry.search_registered_models():
                released = find_released(registry, model)
                sound = {alias: version for alias, version in released.items() if _is_sound(version)}
                manifests = {alias: version.load_manifest_bytes() for alias, version in sound.items()}
                split = _load_split(registry, sound.get("challenger"))
                self._repository.set_release(model, manifests, now=now, split=split, kept=released.keys() - sound)
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

    def _get_settings(self, model: str) -> ModelSettings:
        resolve_definition(self._settings, model, self._directory.path)  # raises what names the missing section
        return self._settings.models[model]

    def _load_calibration(self, model: str, architecture: Architecture) -> npt.NDArray[Any]:
        settings = self._get_settings(model)
        return load_held_out(
            settings.calibration or settings.validation, architecture.inputs[0], architecture.features
        ).x

    def _build_tools(self, model: str, architecture: Architecture, released: Mapping[Role, ModelVersion]) -> Tools:
        runtime = self._get_settings(model).runtime
        definition = resolve_definition(self._settings, model, self._directory.path)
        return Tools(
            measure=self._build_measure(model, architecture),
            tflite=build_exporter(definition) if runtime == "tflite" else None,
            running=[version.directory for version in released.values()],
        )

    def _build_measure(self, model: str, architecture: Architecture) -> Callable[[Path, Path], Quality]:
        path = self._get_settings(model).validation
        data = load_held_out(path, architecture.inputs[0], architecture.features)
        if data.y is None:
            raise ServerError(f"{path} has no y: versions are measured against it")
        metric: str | MetricFunction = architecture.training.metric
        if metric not in METRICS:  # a function of the user's own
            metric = load_definition(resolve_definition(self._settings, model, self._directory.path)).metric
        x, y = data.x, data.y
        return lambda inference_path, float_path: measure_quality(inference_path, float_path, x, y, metric)


def sign_graphs(directory: Directory, version_dir: Path, keys: Sequence[Path]) -> None:
    """Sign the graphs of the version in `version_dir` with the offline key, which may be in one of the folders `keys`.

    Raises:
        ServerError: The key is in none of them.
    """
    manifest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes())
    ReleaseRepository(directory, keys).sign_graphs(_list_graphs(manifest), now=datetime.now(UTC))


def _list_graphs(manifest: ModelManifest) -> dict[str, FileEntry]:
    return {name: manifest.files[name] for name in GRAPH_NAMES if name in manifest.files}


def find_released(registry: Registry, model: str) -> dict[Role, ModelVersion]:
    """Return the versions that devices run or fetch, by alias, the champion first."""
    released: dict[Role, ModelVersion] = {}
    for alias in get_args(Role):  # the previous one's blobs stay for who is fetching them just now
        try:
            released[alias] = registry.get_model_version_by_alias(model, alias)
        except RegistryError:
            continue
    return released


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


def _load_split(registry: Registry, challenger: ModelVersion | None) -> Split | None:
    if challenger is None:
        return None
    tags = registry.get_model_version_tags(challenger.model, challenger.version)
    return parse_json(tags[SPLIT_TAG].encode(), Split)


def _check_comparable(challenger: ModelManifest, champion: ModelVersion) -> None:
    what = f"{challenger.model} version {challenger.version} cannot challenge version {champion.version}"
    if challenger.version == champion.version:
        raise ServerError(f"{what}: it is the champion itself")
    other = champion.load_manifest()
    if (challenger.inputs, challenger.outputs) != (other.inputs, other.outputs):
        raise ServerError(f"{what}: it takes or gives other tensors")


def _check_graphs(manifest: ModelManifest, architecture: Architecture) -> None:
    if manifest.training is None:
        raise RunError(f"{manifest.model} version {manifest.version} is only served: it has no training graph")
    for name in manifest.training.graph_names:
        path = architecture.directory / name
        if not path.exists() or build_digest(path.read_bytes()) != manifest.files[name].digest:
            raise RunError(
                f"{manifest.model} version {manifest.version} was packaged from another {name} than "
                f"{architecture.directory} holds; package and release it again with this federation's --config"
            )


def _refuse(error: StrayingError) -> Verdict:
    assert error.quality is not None
    return Verdict(
        version=None,
        metric=error.quality.metric,
        value=error.quality.value,
        bytes_pushed=0,
        reason=str(error),
    )


def _build_verdict(manifest: ModelManifest, version: int | None, before: ModelManifest | None, reason: str) -> Verdict:
    assert manifest.quality is not None
    return Verdict(
        version=version,
        metric=manifest.quality.metric,
        value=manifest.quality.value,
        bytes_pushed=count_pushed_bytes(build_manifest(manifest), before),
        reason=reason,
    )
