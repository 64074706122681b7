"""What a staged version must show in the sandbox: its golden answers, and a latency beside the champion's."""

import hashlib
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from edge_agent.errors import StalledError
from edge_agent.inference.backend import Array
from edge_agent.inference.model import ServedModel, build_zeros
from models.contract.golden import Golden, explain_straying, parse_golden
from models.contract.manifest import GOLDEN_NAME

_PAIRS, _PAIRS_MIN = 101, 5  # runs of each version that one median is taken of
_BUDGET_S = 1.0  # of them all, but for the least


def try_golden(model: ServedModel, directory: Path) -> Golden | None:
    """Return the golden samples in `directory` once `model` has answered them; None if the version has none there.

    Raises:
        StalledError: Its answers are other ones, or it fails on them, or the file is not what the manifest says.
        MalformedError: The file holds no golden samples of this version.
    """
    path, entry = directory / GOLDEN_NAME, model.manifest.golden
    if entry is None or not path.exists():  # it was staged by an agent that knew of none
        return None
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.digest:
        raise StalledError(f"{path}: not the file that the manifest names: its digest is another")
    golden = parse_golden(data, model.manifest)
    reason = explain_straying(golden, model.infer(golden.inputs))
    if reason is not None:
        raise StalledError(f"{reason}: on this device it is not the version that was packaged")
    return golden


def check_latency(model: ServedModel, champion: ServedModel, golden: Golden | None, *, max_ratio: float) -> None:
    """Return if the median latency of `model` is at most `max_ratio` of the champion's, both measured now, in turns.

    What another process takes meanwhile, both lose alike. A version that seems too slow is measured once more.

    Raises:
        StalledError: It is slower, twice.
    """
    if model.manifest.inputs != champion.manifest.inputs:
        return  # no request can be put to both
    rows = build_zeros(model.manifest, 1) if golden is None else golden.inputs
    inputs = {name: array[:1] for name, array in rows.items()}
    for _ in range(2):
        ratio = _measure_ratio(model, champion, inputs)
        if ratio <= max_ratio:
            return
    raise StalledError(f"its median latency is {ratio:.1f} times the champion's, at most {max_ratio:g} is allowed")


def _measure_ratio(model: ServedModel, champion: ServedModel, inputs: Mapping[str, Array]) -> float:
    """Return the ratio of the two medians on `inputs`."""
    durations_s: tuple[list[float], list[float]] = ([], [])
    ends_s = time.perf_counter() + _BUDGET_S
    while len(durations_s[0]) < _PAIRS and (len(durations_s[0]) < _PAIRS_MIN or time.perf_counter() < ends_s):
        for each, taken in zip((model, champion), durations_s, strict=True):
            taken.append(time_run(each, inputs)[0])
    ours_s, theirs_s = (statistics.median(taken) for taken in durations_s)
    return ours_s / theirs_s


def time_run(model: ServedModel, inputs: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
    """Return how long one run takes, s, and its outputs by name."""
    started_s = time.perf_counter()
    outputs = model.run(inputs)
    return time.perf_counter() - started_s, outputs
