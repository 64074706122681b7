"""What each command does; heavy libraries are imported where they are needed, so that `--help` is quick."""

import json
import sys
import time
from argparse import Namespace
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from fl_server.config import ServerSettings, find_missing, load_server_settings
from fl_server.directory import Directory
from fl_server.errors import ServerError, UsageError
from fl_server.fleet.enrolment import enroll_device, issue_token
from fl_server.fleet.roster import Device, Roster
from fl_server.jobs import (
    Job,
    Jobs,
    JobState,
    PromoteRequest,
    ReleaseRequest,
    Request,
    RollbackRequest,
    TrainRequest,
    WithdrawRequest,
)
from fl_server.lock import holding_lock
from fl_server.rounds.optimizers import ServerOptimizer
from fl_server.rounds.rule import Aggregation
from models.contract.files import is_locked
from models.contract.manifest import MANIFEST_NAME, ModelManifest
from models.contract.privacy import TrainingPlan, Unit
from models.contract.terms import Role, Split

POLL_INTERVAL_S = 0.2  # of a job that is followed


def run_init(arguments: Namespace) -> None:
    from fl_server.initialise import initialise

    initialise(arguments.directory, fleet=arguments.fleet, host=arguments.host, broker_port=arguments.broker_port)
    config_path = Directory(arguments.directory).config_path
    print(f"created {config_path}; add a [models.NAME] section, then: fl-server run --config {config_path}")


def run_coordinator(arguments: Namespace) -> None:
    settings, directory = load(arguments)
    for model in settings.models:
        if missing := find_missing(settings, model, directory.path):
            raise UsageError(f"{missing[0]}: missing or unreadable")
    with holding_lock(directory.lock_path):
        from fl_server.coordinator import run

        run(settings, directory)


def run_enroll(arguments: Namespace) -> None:
    from fl_server.authority import Authority
    from fl_server.enrolment_desk import load_federation

    settings, directory = load(arguments)
    federation = load_federation(settings, directory)
    model = arguments.model or _get_only_model(settings)
    with Roster(directory.database_path) as roster:
        authority = Authority(directory.ca_dir)
        enroll_device(roster, authority, federation, device_id=arguments.device_id, model=model, out_dir=arguments.out)
    print(f"enrolled {arguments.device_id}; move {arguments.out} to the device, it holds the device's private key")


def run_token(arguments: Namespace) -> None:
    settings, directory = load(arguments)
    if not settings.proxy.used:
        raise UsageError("proxy.used is false: nothing takes a token here; enrol the device with fl-server enroll")
    if not 0 < arguments.hours <= 24 * 31:
        raise UsageError(f"--hours is {arguments.hours:g}, must be in (0, 744]")
    model = arguments.model or _get_only_model(settings)
    with Roster(directory.database_path) as roster:
        token = issue_token(
            roster,
            directory.ca_path.read_bytes(),
            device_id=arguments.device_id,
            model=model,
            lifetime_s=arguments.hours * 3600,
            again=arguments.again,
        )
    server = f"{settings.proxy.host}:{settings.proxy.enrolment_port}"
    _say(f"on the device, within {arguments.hours:g} hours: edge-agent enroll --server {server} --out DIR --token ...")
    if not arguments.again:
        _say(
            "a device that was in this fleet before keeps its id (--again): under a new one its budget would start anew"
        )
    print(token)


def run_revoke(arguments: Namespace) -> None:
    from fl_server.authority import Authority

    _, directory = load(arguments)
    with Roster(directory.database_path) as roster:
        roster.revoke(arguments.device_id)
        Authority(directory.ca_dir).save_crl(item.serial for item in roster.list_revoked_certificates())
    print(f"revoked {arguments.device_id}")


def run_devices(arguments: Namespace) -> None:
    _, directory = load(arguments)
    with Roster(directory.database_path) as roster:
        rows = [_describe(device) for device in roster.list_devices()]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'device':<24} {'state':<8} {'model':<16} {'version':>7} {'update':<9} trains")
    for row in rows:
        version = "-" if row["version"] is None else row["version"]
        trains = "yes" if row["trains"] else "no"
        print(
            f"{row['device']:<24} {row['state']:<8} {row['model'] or '-':<16} {version:>7} {row['update'] or '-':<9} {trains}"
        )


def run_doctor(arguments: Namespace) -> None:
    from datetime import UTC, datetime

    from fl_server.doctor import examine
    from models.doctor.findings import describe, find_failures

    findings = examine(arguments.config, now=datetime.now(UTC))
    print(describe(findings, as_json=arguments.json))
    if failures := find_failures(findings):
        raise ServerError(failures)


def run_package(arguments: Namespace) -> None:
    from fl_server.packaging.imported import is_graph_file

    manifest = (_package_file if is_graph_file(arguments.source) else _package_definition)(arguments)
    quality = manifest.quality
    worth = f", {quality.metric} {quality.value:.3f} on {quality.samples} samples" if quality else ""
    size = sum(manifest.files[name].size_bytes for name in manifest.serving_names)
    precision = f" in {manifest.measured.packaged}" if manifest.measured else ""
    print(f"packaged {manifest.model} version {manifest.version} in {arguments.out}: {size} bytes{precision}{worth}")


def _package_definition(arguments: Namespace) -> ModelManifest:
    from fl_server.package import Data, package_definition
    from fl_server.packaging.definitions import load_definition
    from fl_server.packaging.tflite import build_exporter

    _refuse_options(arguments, ("name", "labels"), "a definition says itself")
    definition = load_definition(arguments.source)
    settings, directory = load(arguments) if arguments.config.exists() else (None, None)
    model = settings.models.get(definition.name) if settings else None
    runtime = arguments.runtime or (model.runtime if model else "onnx")
    return package_definition(
        definition,
        directory=directory,
        parameters_path=arguments.parameters,
        data=Data(
            calibration_path=arguments.calibration or (model.calibration if model else None),
            validation_path=arguments.validation or (model.validation if model else None),
        ),
        tflite=build_exporter(arguments.source) if runtime == "tflite" else None,
        out_dir=arguments.out,
        say=_say,
    )


def _package_file(arguments: Namespace) -> ModelManifest:
    from fl_server.package import Data, package_file

    _refuse_options(arguments, ("parameters", "runtime"), f"{arguments.source} is a finished graph")
    if arguments.name is None:
        raise UsageError(f"{arguments.source}: say with --name what it is served as")
    _, directory = load(arguments) if arguments.config.exists() else (None, None)
    return package_file(
        Path(arguments.source),
        model=arguments.name,
        labels=tuple(arguments.labels.split(",")) if arguments.labels else (),
        directory=directory,
        data=Data(calibration_path=arguments.calibration, validation_path=arguments.validation),
        out_dir=arguments.out,
        say=_say,
    )


def _refuse_options(arguments: Namespace, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} cannot be used here: {reason}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def run_release(arguments: Namespace) -> None:
    _, directory = load(arguments)
    split = _build_split(arguments)
    if arguments.version_dir is None:
        enqueue(arguments, directory, _build_verdict(arguments, directory))
        return
    version_dir = prepare_version(arguments, directory)
    enqueue(arguments, directory, ReleaseRequest(version_dir=str(version_dir), split=split))


def prepare_version(arguments: Namespace, directory: Directory) -> Path:
    """Return the folder that is to be released, its graphs signed if `--keys` say with what.

    Raises:
        UsageError: It holds no version.
        ServerError: The key is not where it should be.
    """
    version_dir: Path = arguments.version_dir.resolve()
    if not (version_dir / MANIFEST_NAME).is_file():
        raise UsageError(f"{arguments.version_dir} holds no {MANIFEST_NAME}; a version comes from fl-server package")
    if arguments.keys:  # the coordinator finds the graphs signed, and needs no key that is not its own
        from fl_server.release import sign_graphs

        sign_graphs(directory, version_dir, arguments.keys)
    return version_dir


def _build_split(arguments: Namespace) -> Split | None:
    if not arguments.challenger:
        if arguments.weight is not None or arguments.shadow:
            raise UsageError("--weight and --shadow are about a challenger: add --challenger")
        return None
    if arguments.version_dir is None:
        raise UsageError("--challenger is about a VERSION_DIR: --promote and --withdraw end what is released")
    try:
        return Split(weight=arguments.weight or Decimal(0), shadow=arguments.shadow)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _build_verdict(arguments: Namespace, directory: Directory) -> PromoteRequest | WithdrawRequest:
    if arguments.promote is None:
        version = _find_version(directory, arguments.withdraw, "challenger")
        return WithdrawRequest(model=arguments.withdraw, version=version)
    version = _find_version(directory, arguments.promote, "challenger")
    return PromoteRequest(model=arguments.promote, version=version)


def run_rollback(arguments: Namespace) -> None:
    _, directory = load(arguments)
    _find_version(directory, arguments.model, "previous")  # raises, if there is none to go back to
    version = _find_version(directory, arguments.model, "champion")
    enqueue(arguments, directory, RollbackRequest(model=arguments.model, version=version))


def _find_version(directory: Directory, model: str, alias: Role) -> int:
    from fl_server.registry.registry import Registry

    with Registry(directory.registry_dir) as registry:
        return registry.get_model_version_by_alias(model, alias).version


def run_train(arguments: Namespace) -> None:
    settings, directory = load(arguments)
    if arguments.model not in settings.models:
        known = ", ".join(sorted(settings.models)) or "none"
        raise UsageError(f"{arguments.config}: there is no section [models.{arguments.model}]; models here: {known}")
    request = _build_train_request(arguments, arguments.model)
    with Roster(directory.database_path) as roster:
        enrolled = sum(device.revoked_at is None for device in roster.list_devices())
    try:
        request.aggregation.check_fits(request.unit, devices=enrolled)
    except ValueError as error:
        raise UsageError(str(error)) from error
    enqueue(arguments, directory, request)


def run_simulate(arguments: Namespace) -> None:
    from fl_server.packaging.definitions import load_definition
    from fl_server.simulation.command import simulate

    definition = load_definition(arguments.definition)
    simulate(
        definition,
        _build_train_request(arguments, definition.name),
        reference=arguments.definition,
        train_dir=arguments.train,
        test_dir=arguments.test,
        seed=arguments.seed,
        engine=arguments.engine,
        report_path=arguments.report,
    )


def _build_train_request(arguments: Namespace, model: str) -> TrainRequest:
    try:
        return TrainRequest(
            model=model,
            aggregation=Aggregation(rule=arguments.aggregation, byzantine=arguments.byzantine),
            unit=Unit(arguments.unit),
            optimizer=ServerOptimizer(
                name=arguments.server_optimizer,
                learning_rate=arguments.server_learning_rate,
                momentum=arguments.server_momentum,
            ),
            clipping_quantile=arguments.clipping_quantile,
            participation=arguments.participation,
            epsilon=arguments.epsilon,
            delta=arguments.delta,
            sampling_rate=arguments.sampling_rate,
            clipping_norm=arguments.clipping_norm,
            training=TrainingPlan(
                rounds=arguments.rounds,
                steps=arguments.steps,
                expected_batch=arguments.expected_batch,
                learning_rate=arguments.learning_rate,
                momentum=arguments.momentum,
                optimizer=arguments.optimizer,
                proximal_mu=arguments.proximal_mu,
                uplink=arguments.uplink,
            ),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def run_demo(arguments: Namespace) -> None:
    from fl_server.demo.demo import DemoOptions, run_demo

    options = DemoOptions(
        devices=arguments.devices, rounds=arguments.rounds, epsilon=arguments.epsilon, out_dir=arguments.out
    )
    run_demo(options)


def load_directory(arguments: Namespace) -> Directory:
    """Return the federation that `--config` is of."""
    return load(arguments)[1]


def load(arguments: Namespace) -> tuple[ServerSettings, Directory]:
    """Return the settings and the federation that `--config` is of; raises UsageError if it is of none."""
    settings = load_server_settings(arguments.config)
    directory = Directory(arguments.config.resolve().parent)
    if not directory.database_path.exists():
        raise UsageError(f"{directory.path} holds no federation; create one with fl-server init")
    return settings, directory


def _get_only_model(settings: ServerSettings) -> str:
    if len(settings.models) != 1:
        known = ", ".join(sorted(settings.models)) or "none"
        raise UsageError(f"name what the device serves with --model; models configured: {known}")
    return next(iter(settings.models))


def _describe(device: Device) -> dict[str, str | int | float | bool | None]:
    status = device.status
    if device.revoked_at is not None:
        state = "revoked"
    elif status is None:
        state = "new"
    else:
        state = "online" if status.online else "offline"
    return {
        "device": device.device_id,
        "state": state,
        "model": status.model if status else None,
        "version": status.version if status else None,
        "challenger": status.challenger if status else None,
        "digest": status.digest if status else None,
        "update": status.update if status else None,
        "trains": status is not None and status.trains,
        "rss_mb": device.telemetry.rss_mb if device.telemetry else None,
        "latency_p99_ms": device.telemetry.latency_p99_ms if device.telemetry else None,
    }


def enqueue(arguments: Namespace, directory: Directory, request: Request) -> None:
    """Ask the coordinator for `request` and follow the job as `arguments` say; raises ServerError if it fails."""
    with Jobs(directory.database_path) as jobs:
        number = jobs.add(request)
        if not is_locked(directory.lock_path):
            print(f"job {number} waits for a coordinator: start fl-server run", file=sys.stderr)
        if arguments.no_wait:
            print(f"job {number} is queued")
            return
        job = _follow(jobs, number, sys.stderr if arguments.json else sys.stdout)
    if job.state is JobState.FAILED:
        raise ServerError(job.result or f"job {number} failed")
    if arguments.json:
        print(job.result)


def _follow(jobs: Jobs, number: int, output: TextIO) -> Job:
    """Print the job's lines as they come, and return it once it is over."""
    seen = 0
    while True:
        job = jobs.get(number)  # before the lines: the last one is there once the job is over
        for line_number, line in jobs.list_lines(number, after=seen):
            seen = line_number
            print(line, file=output, flush=True)
        if job.is_over:
            return job
        time.sleep(POLL_INTERVAL_S)
