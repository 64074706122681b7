"""What a coordinator needs for one round's updates, beside a bare running sum, and beside keeping all of them.

Each way runs in a process of its own (`fold.py`), for its peak memory. The fold is measured on 100 updates of 10
million parameters; what goes through the disk on fewer or smaller ones, to spare it.
"""

import json
import statistics
import subprocess
import sys

from fl_server.rounds.rule import RULE_NAMES
from tests.bench.versions import REPOSITORY

UPDATES, PARAMETERS = 100, 10_000_000
STORED_UPDATES = 20
RULE_PARAMETERS = 1_000_000
TURNS = 3


def run() -> dict[str, float]:
    return measure_folds() | measure_storing() | measure_rules()


def measure_folds() -> dict[str, float]:
    turns = [{way: measure(way, UPDATES, PARAMETERS) for way in ("sum", "fold")} for _ in range(TURNS)]
    ratios = [turn["fold"]["s"] / turn["sum"]["s"] for turn in turns]
    kept = measure("keep", UPDATES, PARAMETERS)
    return {
        "sum_of_100_s": statistics.median(turn["sum"]["s"] for turn in turns),
        "fold_of_100_s": statistics.median(turn["fold"]["s"] for turn in turns),
        "fold_to_sum_ratio": statistics.median(ratios),
        "fold_peak_mb": max(turn["fold"]["peak_mb"] for turn in turns),
        "keep_all_peak_mb": kept["peak_mb"],
    }


def measure_storing() -> dict[str, float]:
    """Return what checking, storing and folding takes, beside writing the same bytes."""
    taken = {way: measure(way, STORED_UPDATES, PARAMETERS) for way in ("write", "receive", "receive_int8")}
    return {
        "write_20_s": taken["write"]["s"],
        "receive_20_s": taken["receive"]["s"],
        "receive_20_int8_s": taken["receive_int8"]["s"],
        "receive_to_write_ratio": taken["receive"]["s"] / taken["write"]["s"],
        "receive_peak_mb": taken["receive"]["peak_mb"],
        "receive_int8_peak_mb": taken["receive_int8"]["peak_mb"],
    }


def measure_rules() -> dict[str, float]:
    """Return what each robust rule takes for 100 stored updates of a million parameters."""
    figures: dict[str, float] = {}
    for rule in RULE_NAMES[1:]:
        taken, name = measure(rule, UPDATES, RULE_PARAMETERS), rule.replace("-", "_")
        figures[f"{name}_of_100_s"] = taken["s"]
        figures[f"{name}_peak_mb"] = taken["peak_mb"]
    return figures


def measure(way: str, count: int, size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.fold", way, str(count), str(size)]
    figures: dict[str, float] = json.loads(
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    )
    return figures
