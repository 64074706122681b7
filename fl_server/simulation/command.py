"""`fl-server simulate`: checks, one run, and its `report.json` in the form of the demo's."""

import json
import tempfile
from pathlib import Path
from typing import Any

from fl_server.errors import UsageError
from fl_server.jobs import TrainRequest
from fl_server.packaging.export import export_architecture
from fl_server.plan import build_privacy
from fl_server.simulation.data import check_plan, load_samples
from fl_server.simulation.simulate import Engine, Result, Simulation
from models.definitions import ModelDefinition
from models.definitions.losses import build_target_spec

SEEDED = "follows from the seed: whoever knows it can take the noise off again, so this run is not private"
UNSEEDED = "comes from the operating system's entropy, as on a real device"


def simulate(
    definition: ModelDefinition,
    request: TrainRequest,
    *,
    reference: str,
    train_dir: Path,
    test_dir: Path,
    seed: int | None,
    engine: Engine,
    report_path: Path,
) -> None:
    """Simulate one run, tell of every round on standard output, and write the report.

    Raises:
        UsageError: The plan cannot be met, or the data does not fit; said before anything is trained.
        ServerError: The definition cannot be trained, or the run failed.
    """
    if report_path.is_dir() or not report_path.absolute().parent.is_dir():
        raise UsageError(f"--report is {report_path}, must be a file in a folder that exists")
    target = build_target_spec(definition)
    train, test = (load_samples(directory, definition, target) for directory in (train_dir, test_dir))
    privacy = build_privacy(request, devices=len(train))
    check_plan(
        privacy,
        expected_batch=request.training.expected_batch,
        sizes=[len(samples.x) for samples in train.values()],
    )
    if reference.rpartition(":")[0].endswith(".py"):
        reference = str(Path(reference).resolve())  # processes that play devices may run elsewhere
    with tempfile.TemporaryDirectory(prefix="fl-simulate-") as scratch:
        _say(f"exporting {definition.name}; once, it takes some seconds")
        architecture = export_architecture(definition, Path(scratch, "architecture"))
        simulation = Simulation(definition, architecture, Path(scratch), _say, reference=reference)
        paths = {name: samples.path for name, samples in train.items()}
        result = simulation.run(request, paths, test, seed=seed, engine=engine)
    document = build_report(result, seed=seed)
    report_path.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"noise {document['noise']['note']}")
    _say(f"report: {report_path}")


def build_report(result: Result, *, seed: int | None) -> dict[str, Any]:
    """Return `result` as a JSON object with the fields of the demo's report; nothing is pushed, nobody asks."""
    last = result.rounds[-1]
    versions, number = [], 0
    for done in result.rounds:
        number += done.is_better
        versions.append(
            {
                "version": number if done.is_better else None,
                "round": done.number,
                "metric": round(done.metric, 4),
                "epsilon": done.epsilon,
                "bytes_pushed": 0,
                "promoted": done.is_better,
            }
        )
    return {
        "model": result.model,
        "devices": result.devices,
        "unit": result.privacy.unit.value,
        "epsilon": last.epsilon,
        "delta": float(result.privacy.delta),
        "seconds": round(result.seconds, 1),
        "versions": versions,
        "requests": {"sent": 0, "failed": 0},
        "agent_rss_mb": 0.0,
        "training_rss_mb": round(result.training_mb, 1),
        "metric": {
            "name": result.metric_name,
            "value": round(last.metric, 4),
            "per_device": [None if value is None else round(value, 4) for value in result.per_device],
        },
        "noise": {
            "multiplier": float(result.privacy.noise_multiplier),
            "seed": seed,
            "private": seed is None,
            "note": UNSEEDED if seed is None else SEEDED,
        },
        "parameters_digest": result.parameters_digest,
    }


def _say(line: str) -> None:
    print(line, flush=True)
