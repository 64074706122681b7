"""From a round's parameters to a registered version: package them, measure them, and ask the gate."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from fl_server.config import ModelSettings, ServerSettings, resolve_definition
from fl_server.directory import Directory
from fl_server.errors import RunError, ServerError
from fl_server.evaluation.evaluate import measure_quality
from fl_server.evaluation.gate import Decision, GateRules, decide_promotion
from fl_server.evaluation.metrics import METRICS, MetricFunction
from fl_server.held_out import load_held_out
from fl_server.packaging.architecture import Architecture, load_architecture
from fl_server.packaging.definitions import load_definition
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.precision import StrayingError
from fl_server.packaging.tflite import build_exporter
from fl_server.registry.registry import ModelVersion, Registry, RegistryError
from fl_server.rollout.publisher import count_pushed_bytes
from models.contract.encoding import build_digest
from models.contract.manifest import Lineage, ModelManifest, Quality, build_manifest
from models.contract.privacy import PrivacyStatement
from models.contract.terms import Role


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
class Candidate:
    """A version of a round's parameters.

    Attributes:
        before: The champion that it was measured against; None for a version that is registered already.
        directory: Where it was packaged; None likewise.
    """

    manifest: ModelManifest
    before: ModelManifest | None = None
    directory: Path | None = None


class Candidates:
    """What becomes of parameters; nothing here is offered to anybody."""

    def __init__(self, settings: ServerSettings, directory: Directory) -> None:
        self._settings, self._directory = settings, directory

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

    def prepare(
        self,
        model: str,
        parameters: Mapping[str, npt.NDArray[np.float32]],
        *,
        lineage: Lineage,
        privacy: PrivacyStatement,
        scratch_dir: Path,
    ) -> Candidate | Verdict:
        """Package and measure `parameters`, or find what an earlier call registered; as `Releases.consider`."""
        champion, architecture = self.load_champion(model)
        with Registry(self._directory.registry_dir) as registry:
            known = registry.search_model_versions(model, run=lineage.run, round=lineage.round)
            if known:  # registered, then the coordinator was killed
                return Candidate(manifest=known[0].load_manifest())
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
        return Candidate(manifest=manifest, before=champion.load_manifest(), directory=scratch_dir)

    def decide(self, candidate: Candidate | Verdict, obstacle: str | None) -> Verdict:
        """Make the candidate the champion if it beats the one before and there is no obstacle.

        What it was measured against may have changed since: then it is refused.
        """
        if isinstance(candidate, Verdict):
            return candidate
        manifest, before, directory = candidate.manifest, candidate.before, candidate.directory
        with Registry(self._directory.registry_dir) as registry:
            if before is None or directory is None:
                return _decide_known(registry, manifest, obstacle)
            champion = registry.get_model_version_by_alias(manifest.model, "champion").version
            if obstacle is None and champion != before.version:
                obstacle = f"version {champion} became the champion while this one was measured"
            if obstacle is None and registry.get_next_version(manifest.model) != manifest.version:
                obstacle = f"another version {manifest.version} was registered while this one was measured"
            assert manifest.quality is not None
            decision = decide_promotion(manifest.quality, before.quality, GateRules())
            if obstacle is not None:
                decision = Decision(promote=False, reason=obstacle)
            if decision.promote:
                registry.create_model_version(directory)
                registry.set_registered_model_alias(manifest.model, "champion", manifest.version)
            shutil.rmtree(directory)
            return _build_verdict(manifest, manifest.version if decision.promote else None, before, decision.reason)

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


def _decide_known(registry: Registry, manifest: ModelManifest, obstacle: str | None) -> Verdict:
    """Release what was registered just before the coordinator was killed, unless it was released since."""
    released = find_released(registry, manifest.model)
    was_previous = "previous" in released and released["previous"].version == manifest.version  # rolled back, say
    if released["champion"].version < manifest.version and not was_previous:
        if obstacle is not None:
            return _build_verdict(manifest, None, None, obstacle)
        registry.set_registered_model_alias(manifest.model, "champion", manifest.version)
    return _build_verdict(manifest, manifest.version, None, "released before a restart")


def find_released(registry: Registry, model: str) -> dict[Role, ModelVersion]:
    """Return the versions that devices run or fetch, by alias, the champion first."""
    released: dict[Role, ModelVersion] = {}
    for alias in get_args(Role):  # the previous one's blobs stay for who is fetching them just now
        try:
            released[alias] = registry.get_model_version_by_alias(model, alias)
        except RegistryError:
            continue
    return released


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
