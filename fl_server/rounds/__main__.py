"""`python -m fl_server.rounds RUN_DIR`: the coordinator's child process that drives one run."""

import argparse
import logging
import sys
from pathlib import Path

from fl_server.errors import ServerError
from fl_server.rounds.driver import Driver
from fl_server.rounds.events import Event, build_event
from fl_server.rounds.words import StoppedError, Words


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fl_server.rounds", description="Drive one run to its end.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with run.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        Driver(arguments.run_dir, words=Words(sys.stdin), emit=_emit).run()
    except (StoppedError, BrokenPipeError):
        return 0
    except (ServerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _emit(event: Event) -> None:
    sys.stdout.buffer.write(build_event(event))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
