"""Runs with virtual devices: the definition is exported once, then the real round driver drives the real device code.

definition --> step graph --> run directory --> Driver --> VirtualDevices --> processes of edge_agent.simulated
                                                  `--every round--> evaluated on the test files
"""

import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fl_server.claim import count_cohort
from fl_server.errors import UsageError
from fl_server.evaluation.evaluate import Evaluator, Part
from fl_server.evaluation.gate import GateRules, decide_promotion
from fl_server.evaluation.metrics import get_metric_name
from fl_server.jobs import TrainRequest
from fl_server.packaging.architecture import Architecture
from fl_server.packaging.package import write_local
from fl_server.packaging.staging import describe_file
from fl_server.plan import build_privacy, compute_norm_limit
from fl_server.privacy.statement import build_statement
from fl_server.rounds.driver import Driver, Exchange
from fl_server.rounds.events import Event, RoundCompleted, UpdateRefused
from fl_server.rounds.run import PARAMETERS_NAME, RunSpec, build_round_dir, create_run, load_parameters
from fl_server.simulation.data import Samples
from fl_server.simulation.workers import VirtualDevices, measure_mb, play
from models.contract.encoding import build_digest, build_json
from models.contract.manifest import (
    INFERENCE_NAMES,
    MANIFEST_NAME,
    ModelManifest,
    Quality,
    build_manifest,
)
from models.contract.privacy import PrivacyPlan, Unit
from models.contract.simulation import SimulationJob
from models.definitions import ModelDefinition
from models.tensors.layout import parse_vector_bytes
from models.tensors.noise import Keystream

FLEET, RUN = "simulation", "simulation"
_FOREVER_S = 1e6  # virtual devices are never late
_ORDER_KEY_NAME, _GRAPH_DIR_NAME, _RUN_DIR_NAME, _LOCAL_DIR_NAME = "order-key.pem", "version", "run", "local"
_DIGITS = Decimal("0.000001")

Engine: TypeAlias = Literal["inline", "ray"]
Say = Callable[[str], None]
Named: TypeAlias = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round brought; round 0 is the untrained model.

    Attributes:
        metric: On all test samples together.
        epsilon: Spent from the run's start.
        is_better: Than all before it, by the gate's rule.
    """

    number: int
    metric: float
    epsilon: float
    is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One simulated run.

    Attributes:
        model: Its name.
        per_device: The metric of the last round on each test file; None where it is undefined there.
        parameters_digest: Of the last round's file of parameters: equal for runs equal to the last bit.
        training_mb: Memory resident in the largest process that played devices.
    """

    model: str
    metric_name: str
    rounds: tuple[Round, ...]
    privacy: PrivacyPlan
    devices: int
    per_device: tuple[float | None, ...]
    parameters_digest: str
    seconds: float
    training_mb: float


class Simulation:
    """A definition, exported once, whose runs are simulated; a context for a folder of its own."""

    def __init__(
        self,
        definition: ModelDefinition,
        architecture: Architecture,
        scratch_dir: Path,
        say: Say,
        *,
        reference: str | None = None,
    ) -> None:
        """Prepare what virtual devices train with.

        Args:
            definition: Says the metric.
            architecture: Exported from it.
            scratch_dir: Is filled: graphs, and one run at a time.
            say: Takes a line a round.
            reference: Where devices find the definition, if they train with the Opacus engine.
        """
        self._reference = reference
        self._definition, self._architecture, self._scratch_dir, self._say = definition, architecture, scratch_dir, say
        self._graph_dir = scratch_dir / _GRAPH_DIR_NAME
        self._manifest = _write_version(architecture, self._graph_dir)
        self._evaluator = Evaluator(architecture.evaluate_path, architecture.training, definition.metric)

    def run(
        self,
        request: TrainRequest,
        train: Mapping[str, Path],
        test: Mapping[str, Samples],
        *,
        seed: int | None,
        engine: Engine = "inline",
    ) -> Result:
        """Simulate one run.

        Args:
            request: What is asked for, as of a real run.
            train: The file of x and y of each device, by its name, already checked.
            test: What is measured after every round; never trained on.
            seed: All randomness follows from it, which is not private; None draws from the operating system.
            engine: Who runs the devices: a process a core, or Flower's simulation engine on Ray.

        Raises:
            UsageError: No noise keeps the budget, or the engine is not installed.
            RunError: A process of virtual devices failed.
        """
        started, metric_name = time.monotonic(), get_metric_name(self._definition.metric)
        key = Ed25519PrivateKey.generate()
        run_dir, local_dir = self._scratch_dir / _RUN_DIR_NAME, self._scratch_dir / _LOCAL_DIR_NAME
        for directory in (run_dir, local_dir):
            shutil.rmtree(directory, ignore_errors=True)
        local_dir.mkdir()
        spec = self._build_spec(request, sorted(train), self._save_key(key))
        initial = self._architecture.load_initial_parameters()
        create_run(run_dir, spec, spec.layout.flatten({name: initial[name] for name in spec.layout.names}))
        job = SimulationJob(
            fleet=FLEET,
            graph_dir=str(self._graph_dir),
            definition=self._reference,
            coordinator_key=key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
            samples={name: str(path) for name, path in train.items()},
            local_dir=str(local_dir),
            seed=seed,
        )
        load = partial(self._load_parts, spec, run_dir, initial, test)
        course = _Course(self._evaluator, metric_name, spec, load, self._say)
        course.conclude(0)
        entropy = os.urandom if seed is None else Keystream(random.Random(f"{seed} coordinator").randbytes)

        def drive(exchange: AbstractContextManager[Exchange]) -> None:
            Driver(
                run_dir, words=_Unattended(), emit=course.take, open_exchange=lambda _spec: exchange, entropy=entropy
            ).run()

        if engine == "ray":
            _run_on_ray(job, spec, self._scratch_dir, drive)
        else:
            drive(VirtualDevices(job, scratch_dir=self._scratch_dir))
        return Result(
            model=self._definition.name,
            metric_name=metric_name,
            rounds=tuple(course.rounds),
            privacy=spec.privacy,
            devices=len(train),
            per_device=course.measure_each(),
            parameters_digest=build_digest(
                (build_round_dir(run_dir, spec.training.rounds) / PARAMETERS_NAME).read_bytes()
            ),
            seconds=time.monotonic() - started,
            training_mb=course.training_mb,
        )

    def _load_parts(
        self, spec: RunSpec, run_dir: Path, initial: Named, test: Mapping[str, Samples], number: int
    ) -> list[Part]:
        """Return the samples of `test`, each device's with the parameters that it has after round `number`."""
        released = {**initial, **spec.layout.unflatten(load_parameters(run_dir, spec.layout, number))}
        local = self._architecture.training.layout.select(self._architecture.training.local)
        parts: list[Part] = []
        for name, samples in test.items():
            path = self._scratch_dir / _LOCAL_DIR_NAME / f"{name}.f32"
            own = local.unflatten(parse_vector_bytes(path.read_bytes())) if path.exists() else None
            parts.append((released | own if own else released, samples.x, samples.y))
        return parts

    def _save_key(self, key: Ed25519PrivateKey) -> Path:
        path = self._scratch_dir / _ORDER_KEY_NAME
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path

    def _build_spec(self, request: TrainRequest, names: list[str], key_path: Path) -> RunSpec:
        training, layout = request.training, self._architecture.training.shared
        privacy = build_privacy(request, devices=len(names))
        return RunSpec(
            fleet=FLEET,
            model=request.model,
            run=RUN,
            graph_digest=self._manifest.step_digest,
            layout=layout,
            privacy=privacy,
            training=training,
            devices={name: node for node, name in enumerate(names)},
            quorum=1 if privacy.unit is Unit.DEVICE else len(names),
            deadline_s=_FOREVER_S,
            join_timeout_s=_FOREVER_S,
            superlink="",
            ca_path="",
            superexec_secret_path="",
            order_key_path=str(key_path),
            update_norm_limit=compute_norm_limit(privacy, training, layout.size),
            aggregation=request.aggregation,
            optimizer=request.optimizer,
            clipping_quantile=request.clipping_quantile,
        )


def _run_on_ray(
    job: SimulationJob, spec: RunSpec, scratch_dir: Path, drive: Callable[[AbstractContextManager[Exchange]], None]
) -> None:
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Flower's simulation engine: pip install 'edge-fl[simulation]'")
    from fl_server.rounds.flower.engine import run_on_engine

    train = partial(play, build_json(job), scratch_dir / "workers.log")
    run_on_engine(sorted(spec.devices), train, lambda exchange: drive(nullcontext(exchange)))


class _Unattended:
    """Lets a run go on at once: nobody waits for a round's release."""

    def wait_for_permit(self) -> None:
        pass

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def take_gone(self) -> list[tuple[str, int]]:
        return []


class _Course:
    """What a run brings, round by round."""

    def __init__(
        self,
        evaluator: Evaluator,
        metric_name: str,
        spec: RunSpec,
        load: Callable[[int], list[Part]],
        say: Say,
    ) -> None:
        self._metric_name = metric_name
        self._evaluator, self._spec, self._load, self._say = evaluator, spec, load, say
        self._best: Quality | None = None
        self._parts: list[Part] = []
        self.rounds: list[Round] = []
        self.training_mb = 0.0

    def take(self, event: Event) -> None:
        match event:
            case RoundCompleted():
                self.conclude(event.round)
                self.training_mb = max(self.training_mb, measure_mb())
                done = self.rounds[-1]
                self._say(
                    f"round {done.number}/{self._spec.training.rounds}: {len(event.accepted)} of "
                    f"{len(self._spec.devices)} devices, {event.seconds:.1f} s, {self._metric_name} {done.metric:.3f}, "
                    f"epsilon {done.epsilon:.2f}"
                )
            case UpdateRefused():
                self._say(f"round {event.round}: the update of {event.device} does not count: {event.reason}")
            case _:
                pass

    def conclude(self, number: int) -> None:
        """Measure round `number`."""
        self._parts = self._load(number)
        evaluation = self._evaluator.evaluate_parts(self._parts)
        value = Decimal(evaluation.value).quantize(_DIGITS)
        quality = Quality(
            metric=self._metric_name,
            value=value,
            samples=evaluation.samples,
            float_value=value,
            logit_deviation=Decimal(0),
        )
        is_better = decide_promotion(quality, self._best, GateRules()).promote
        if is_better:
            self._best = quality
        statement = build_statement(
            self._spec.privacy,
            steps=self._spec.training.steps,
            rounds_done=number,
            cohort=count_cohort(self._spec.privacy, len(self._spec.devices)),
        )
        self.rounds.append(
            Round(number=number, metric=float(value), epsilon=float(statement.epsilon), is_better=is_better)
        )

    def measure_each(self) -> tuple[float | None, ...]:
        """Return the metric of the last round on each test file; None where it has no value there."""
        values: list[float | None] = []
        for part in self._parts:
            try:
                values.append(self._evaluator.evaluate(*part).value)
            except ValueError:  # such as an auc of one class
                values.append(None)
        return tuple(values)


def _write_version(architecture: Architecture, directory: Path) -> ModelManifest:
    """Write to `directory` what a device needs to train, as a version in float32."""
    directory.mkdir()
    sources = {INFERENCE_NAMES["onnx"]: architecture.float_path, **architecture.graph_paths}
    for name, path in sources.items():
        shutil.copyfile(path, directory / name)
    write_local(directory, architecture.training, architecture.load_initial_parameters())
    manifest = ModelManifest(
        model=architecture.model,
        version=1,
        runtime="onnx",
        inputs=architecture.inputs,
        outputs=architecture.outputs,
        labels=architecture.labels,
        features=architecture.features,
        files={path.name: describe_file(path) for path in sorted(directory.iterdir())},
        training=architecture.training,
    )
    (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
    return manifest
