"""What `fl-server rollout` does."""

import sys
from argparse import Namespace
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from fl_server.commands import enqueue, load, prepare_version
from fl_server.config import ServerSettings, resolve_definition
from fl_server.directory import Directory
from fl_server.errors import ServerError, UsageError
from fl_server.fleet.roster import Roster
from fl_server.jobs import RolloutRequest, SteerRequest
from fl_server.registry.registry import ModelVersion, Registry
from fl_server.rollout.plan import RolloutPlan
from fl_server.rollout.records import RolloutRecords
from fl_server.rollout.waves import Rollout, approve, halt, resume
from fl_server.rollout_status import build_status, list_words
from models.contract.encoding import build_json
from models.contract.manifest import INFERENCE_NAMES, MANIFEST_NAME, ModelManifest, parse_manifest
from models.contract.settings import load_settings


def run_start(arguments: Namespace) -> None:
    settings, directory = load(arguments)
    plan = _build_plan(arguments)
    version_dir = prepare_version(arguments, directory)
    manifest = parse_manifest((version_dir / MANIFEST_NAME).read_bytes())
    with Registry(directory.registry_dir) as registry:
        champion = registry.get_model_version_by_alias(manifest.model, "champion")
    _check_quality(settings, directory, (version_dir, manifest), champion, plan)
    enqueue(arguments, directory, RolloutRequest(version_dir=str(version_dir), plan=plan))


def run_status(arguments: Namespace) -> None:
    _, directory = load(arguments)
    with RolloutRecords(directory.database_path) as records, Roster(directory.database_path) as roster:
        found = records.list_all() if arguments.model is None else [_find(records, arguments.model)]
        states = [build_status(rollout, list_words(roster, rollout)) for rollout in found]
    if arguments.json:
        print(build_json(states if arguments.model is None else states[0]).decode())
        return
    for state in states:
        print(state)
    if not states:
        print("nothing is being rolled out", file=sys.stderr)


def run_approve(arguments: Namespace) -> None:
    _steer(arguments, "approve")


def run_halt(arguments: Namespace) -> None:
    _steer(arguments, "halt")


def run_resume(arguments: Namespace) -> None:
    _steer(arguments, "resume")


def _steer(arguments: Namespace, action: Literal["approve", "halt", "resume"]) -> None:
    _, directory = load(arguments)
    with RolloutRecords(directory.database_path) as records:
        rollout = _find(records, arguments.model)
    following = rollout.wave + 1
    match action:  # refused before it is queued, if it makes no sense now
        case "approve":
            approve(rollout, following)
        case "halt":
            halt(rollout, "")
        case "resume":
            resume(rollout, since=0)
    request = SteerRequest(model=rollout.model, version=rollout.version, action=action, wave=following)
    enqueue(arguments, directory, request)


def _find(records: RolloutRecords, model: str) -> Rollout:
    rollout = records.find(model)
    if rollout is None:
        raise ServerError(f"{model} is not being rolled out; begin with fl-server rollout start VERSION_DIR")
    return rollout


def _build_plan(arguments: Namespace) -> RolloutPlan:
    plan = RolloutPlan()
    if arguments.plan is not None:
        plan = load_settings(arguments.plan, RolloutPlan, prefix="", environment={})
    try:
        if arguments.waves is not None:
            plan = replace(plan, waves=tuple(Decimal(each) for each in arguments.waves.split(",")))
        if arguments.devices is not None:
            plan = replace(plan, devices=tuple(arguments.devices.split(",")))
    except InvalidOperation as error:
        raise UsageError(f"--waves {arguments.waves}: expected percentages, 1,10,100 for instance") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    return plan


def _check_quality(
    settings: ServerSettings,
    directory: Directory,
    candidate: tuple[Path, ModelManifest],
    champion: ModelVersion,
    plan: RolloutPlan,
) -> None:
    """Raise ServerError if the version is worse than the champion by more than the plan allows.

    Both are measured on the server's held-out data; a graph may do anything there, so this runs in the command.
    """
    from fl_server.evaluation.gate import find_drop

    version_dir, manifest = candidate
    before = champion.load_manifest()
    if manifest.quality is None or before.quality is None or manifest.quality.metric != before.quality.metric:
        print("not measured beside the champion: one of them was packaged without validation data", file=sys.stderr)
        return
    values = manifest.quality.value, before.quality.value
    if manifest.model in settings.models:
        measured = [(version_dir, manifest), (champion.directory, before)]
        values = _measure(settings, directory, *measured[0]), _measure(settings, directory, *measured[1])
    drop = find_drop(manifest.quality.metric, *values, max_drop=plan.max_quality_drop)
    if drop is not None:
        raise ServerError(f"{manifest.model} version {manifest.version} is not rolled out: {drop}")


def _measure(settings: ServerSettings, directory: Directory, version_dir: Path, manifest: ModelManifest) -> Decimal:
    from fl_server.evaluation.evaluate import measure_packaged
    from fl_server.evaluation.metrics import METRICS, MetricFunction
    from fl_server.held_out import load_held_out
    from fl_server.packaging.definitions import load_definition

    assert manifest.quality is not None
    path = settings.models[manifest.model].validation
    data = load_held_out(path, manifest.inputs[0], manifest.features)
    if data.y is None:
        raise ServerError(f"{path} has no y: versions are measured against it")
    metric: str | MetricFunction = manifest.quality.metric
    if metric not in METRICS:  # a function of the user's own
        metric = load_definition(resolve_definition(settings, manifest.model, directory.path)).metric
    inputs = {manifest.inputs[0].name: data.x}
    return measure_packaged(inputs, data.y, version_dir / INFERENCE_NAMES[manifest.runtime], metric)
