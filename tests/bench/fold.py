"""A process that makes one step of updates as they arrive: `python -m tests.bench.fold WAY UPDATES SIZE`.

sum                    a running sum in float64 and nothing else: the floor
keep                   all updates kept, and summed then
fold                   what a round does for its mean
write                  the updates written and synced, and nothing else: the floor of storing them
receive, receive_int8  all that a driver does with a reply: check, store, fold
median, multi-krum, …  a rule, over updates that are stored already
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fl_server.rounds.aggregation import SumFold, check_update, move
from fl_server.rounds.robust import aggregate
from fl_server.rounds.rule import Aggregation
from fl_server.rounds.spool import Spool
from models.contract.files import save_atomically
from models.contract.privacy import Uplink
from models.tensors.uplink import encode_update
from tests.bench.first_step import read_peak_mb


class Clock:
    """Adds up the time spent inside of it: not that of arriving."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def main() -> None:
    """Do it in the way named first; print how long it took, and the peak memory of this process."""
    way, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix=".fold-", dir=Path.cwd()) as directory:  # /tmp may be memory
        if way == "sum":
            run_sum(clock, count, size)
        elif way == "keep":
            run_keep(clock, count, size)
        elif way == "fold":
            run_fold(clock, count, size)
        elif way == "write":
            run_write(clock, count, size, Path(directory))
        elif way.startswith("receive"):
            run_receive(clock, count, size, Path(directory), "int8" if way == "receive_int8" else "float32")
        else:
            run_rule(clock, count, size, Path(directory), Aggregation(rule=way, byzantine=count // 5))
    print(json.dumps({"s": clock.seconds, "peak_mb": read_peak_mb()}))


def arrive(count: int, size: int, uplink: Uplink = "float32") -> Iterator[bytes]:
    """Yield `count` encoded updates, each in memory of its own."""
    generator = np.random.default_rng(0)
    data = bytearray(encode_update(generator.standard_normal(size, dtype=np.float32), uplink, generator))
    for _ in range(count):
        yield bytes(data)


def run_sum(clock: Clock, count: int, size: int) -> None:
    with clock:
        total = np.zeros(size)
    for data in arrive(count, size):
        with clock:
            total += np.frombuffer(data, np.float32)


def run_keep(clock: Clock, count: int, size: int) -> None:
    kept = [np.frombuffer(data, np.float32) for data in arrive(count, size)]
    with clock:
        total = np.zeros(size)
        for update in kept:
            total += update


def run_fold(clock: Clock, count: int, size: int) -> None:
    parameters = np.zeros(size, np.float32)
    with clock:
        fold = SumFold(size)
    for data in arrive(count, size):
        with clock:
            fold.add(np.frombuffer(data, np.float32))
    with clock:
        move(parameters, fold.finish(count))


def run_write(clock: Clock, count: int, size: int, directory: Path) -> None:
    for number, data in enumerate(arrive(count, size)):
        with clock:
            save_atomically(directory / f"{number}", data)


def run_receive(clock: Clock, count: int, size: int, directory: Path, uplink: Uplink) -> None:
    parameters = np.zeros(size, np.float32)
    with clock:
        spool, fold = Spool(directory / "updates", size), SumFold(size)
    for number, data in enumerate(arrive(count, size, uplink)):
        with clock:
            update = check_update(data, size=size, norm_limit=1e9, uplink=uplink)
            assert not isinstance(update, str)
            spool.add(f"device-{number}", update)
            fold.add(update)
    with clock:
        move(parameters, fold.finish(count))


def run_rule(clock: Clock, count: int, size: int, directory: Path, aggregation: Aggregation) -> None:
    spool, generator = Spool(directory / "updates", size), np.random.default_rng(0)
    for number in range(count):
        spool.add(f"device-{number}", generator.standard_normal(size, dtype=np.float32))
    with clock:
        aggregate(spool.read_columns, count=count, size=size, aggregation=aggregation)


if __name__ == "__main__":
    main()
