"""Run the `bench_*.py` here, print what they measured, write it all as JSON.

Without names all run but `bench_uplink`, which trains for minutes and compares no times; `accuracy.py` and
`accuracy_of_device_unit.py` are programs of their own for the same reason.

Each module has `run() -> dict[str, float]`; names end in their unit, ratios in `_ratio`.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

BY_NAME_ONLY = {"bench_uplink"}


def main() -> int:
    """Return 0, or 1 if a benchmark broke."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"{min(unknown)!r} is none of {', '.join(names)}")
    figures: dict[str, dict[str, float]] = {}
    load = os.getloadavg()[0]
    for name in arguments.names or sorted(set(names) - BY_NAME_ONLY):
        started = time.monotonic()
        figures[name] = importlib.import_module(f"tests.bench.{name}").run()
        print(f"\n{name} ({time.monotonic() - started:.0f} s)")
        for key, value in figures[name].items():
            print(f"  {key:<48} {value:>12.4g}")
    if arguments.out:
        machine = {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "load_average_before": load,  # neighbours on shared cores make every absolute figure worse
        }
        arguments.out.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
