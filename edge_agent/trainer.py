"""The training process: `python -m edge_agent.trainer`, one run from joining to idleness.

Reads a `TrainingJob` on stdin, prints one `TrainingEvent` a line on stdout; 0 when idle, 1 and one line on
stderr when it failed. On SIGTERM it takes leave of the SuperLink, so that no round waits for it. The agent that starts it also limits its math libraries to one thread.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from edge_agent.children import forbid_core_dumps
from edge_agent.errors import AgentError, EngineError, StalledError
from edge_agent.samples.cipher import open_cipher
from edge_agent.samples.store import SampleStore, open_samples
from edge_agent.training import node
from edge_agent.training.bounded_sgd import bounded_training
from edge_agent.training.dp_sgd import local_training
from edge_agent.training.job import TrainingEvent, TrainingJob, build_event, parse_job
from edge_agent.training.ledger import Ledger, NoCopyError, open_ledger
from edge_agent.training.local import LocalParameters, load_initial
from edge_agent.training.session import TrainingSession
from edge_agent.training.step import Step, open_step
from edge_agent.training.updates import UpdateStore
from models.contract.errors import ContractError
from models.contract.identity import Identity
from models.contract.manifest import MANIFEST_NAME, ModelManifest, parse_manifest
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Vector
from models.tensors.noise import draw_gaussian, draw_poisson

_log = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"
UPDATES_NAME = "updates"
_NICENESS = 10  # serving goes first
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def main() -> int:
    """Run the job on stdin; return the exit code."""
    _die_with_parent()
    forbid_core_dumps()
    os.nice(_NICENESS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with os.fdopen(os.dup(1), "wb", buffering=0) as events:
        os.dup2(2, 1)  # what a library prints must not pass for an event

        def report(event: TrainingEvent) -> None:
            events.write(build_event(event))

        try:
            train(parse_job(sys.stdin.buffer.read()), report=report)
        except (AgentError, ContractError) as error:
            print(f"edge-agent training: {error}", file=sys.stderr)
            return 1
    return 0


def train(job: TrainingJob, *, report: Callable[[TrainingEvent], None]) -> None:
    """Serve the rounds of `job` until no message has come for its idle timeout.

    Raises:
        AgentError: The process cannot do its part.
        ContractError: The version's manifest is not one.
    """
    manifest = _load_manifest(job)
    key = _parse_key(job.coordinator_key_pem)
    try:
        step = open_step(Path(job.graph_dir), manifest, job.definition)
    except EngineError as error:
        report(TrainingEvent(event="refused", message=str(error)))
        return
    assert manifest.training is not None  # the step opened
    training_dir = Path(job.training_dir)
    updates = UpdateStore(training_dir / UPDATES_NAME)
    samples_key = bytes.fromhex(job.samples_key)
    initial = load_initial(Path(job.graph_dir), manifest)
    local = LocalParameters(training_dir, manifest, initial, open_cipher(samples_key))
    with (
        open_ledger(training_dir / LEDGER_NAME) as ledger,
        open_samples(Path(job.samples_path), model=job.model, key=samples_key) as samples,
    ):
        try:
            _restore(ledger, job)
        except NoCopyError as error:
            report(TrainingEvent(event="refused", message=str(error)))
            return
        updates.remove_other_runs(job.run)
        session = TrainingSession(
            job=job,
            graph_digest=manifest.step_digest,
            size=manifest.training.shared.size,
            key=key,
            ledger=ledger,
            updates=updates,
            local=local,
            train=_build_training(step, samples, manifest),
            report=report,
        )
        node.serve(
            superlink=job.superlink,
            ca_path=Path(job.ca_path),
            node_key_path=Path(job.node_key_path),
            identity=_build_identity(job),
            poll_interval_s=job.poll_interval_s,
            idle_timeout_s=job.idle_timeout_s,
            handle=session.handle,
            on_joined=lambda: report(_build_joined(ledger, job.run)),
        )
    report(TrainingEvent(event="ended", message=f"no message of run {job.run!r} for {job.idle_timeout_s:g} s"))


def _build_identity(job: TrainingJob) -> Identity | None:
    if job.cert_path is None or job.key_path is None:
        return None
    return Identity(ca_path=Path(job.ca_path), cert_path=Path(job.cert_path), key_path=Path(job.key_path))


def _build_joined(ledger: Ledger, run: str) -> TrainingEvent:
    rounds = [entry.round for entry in ledger.entries if entry.run == run]
    # Which rounds stand in what was taken from the coordinator's copy is not known here: told back to it, they would be
    # added to it once more.
    is_known = bool(rounds) or not any(entry.restored_from for entry in ledger.entries)
    return TrainingEvent(
        event="joined",
        message=f"joined run {run!r}",
        round=max(rounds, default=0),
        ledger=ledger.head if is_known else None,
    )


def _restore(ledger: Ledger, job: TrainingJob) -> None:
    restored = ledger.restore(job.ledger_copy, job.delta, at=int(time.time()))
    if restored:
        _log.warning("%d entries were missing in the privacy ledger: taken from the coordinator's copy", restored)


def _build_training(
    step: Step, samples: SampleStore, manifest: ModelManifest
) -> Callable[[Vector, PrivacyPlan, TrainingPlan], Vector]:
    assert manifest.training is not None  # the step opened
    target = manifest.training.target

    def run_round(parameters: Vector, privacy: PrivacyPlan, training: TrainingPlan) -> Vector:
        # Read anew each round: a sample that was forgotten since must not be used.
        x, y = samples.load(manifest.training_input, target)
        if privacy.unit is Unit.DEVICE:
            return bounded_training(step, x, y, parameters, privacy, training, draw_poisson)
        return local_training(step, x, y, parameters, privacy, training, draw_gaussian, draw_poisson)

    return run_round


def _load_manifest(job: TrainingJob) -> ModelManifest:
    path = Path(job.graph_dir) / MANIFEST_NAME
    try:
        manifest = parse_manifest(path.read_bytes())
    except OSError as error:
        raise StalledError(f"{path}: {error.strerror}") from error
    if manifest.model != job.model:
        raise StalledError(f"{path} is of model {manifest.model!r}, expected {job.model!r}")
    return manifest


def _parse_key(pem: str) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise StalledError(f"the coordinator's key is no PEM public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise StalledError(f"the coordinator's key is {type(key).__name__}, expected Ed25519")
    return key


def _die_with_parent() -> None:
    """Have the kernel end this process when the agent ends; one that has ended already left an empty stdin."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
