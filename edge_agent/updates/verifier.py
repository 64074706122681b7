"""Verifies an offer in a process of its own: `python -m edge_agent.updates.verifier`, document in, targets out.

An offer is whatever a broker serves, and tuf and its cryptography take 14 MB that nobody needs until the next one.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_agent.children import DeadlineError, bound_this_process, run_child
from edge_agent.errors import StalledError, TransientError
from edge_agent.updates.targets import SignedTarget, SignedTargets
from models.contract.encoding import build_json, parse_json

DEADLINE_S = 50.0  # takes 0.3 s of processor time, on a busy device 10 s
_CPU_S = 30
_MEMORY_BYTES = 512 * 1024**2
_SAID_MAX_BYTES = 1024 * 1024


def verify_offer(payload: bytes, *, root: bytes, trust_dir: Path, told: Sequence[Path] = ()) -> SignedTargets:
    """Return what `payload` offers, and trust it from now on; blocks.

    Args:
        payload: The retained offer.
        root: The root of trust from enrolment.
        trust_dir: Where what is trusted is kept; only newer offers are accepted after this one.
        told: Files of floors that the coordinator told; those that are not there tell nothing.

    Raises:
        StalledError: Not a whole, genuine, fresh offer of this fleet; trust is unchanged.
        TransientError: This machine had no time or no process for it.
    """
    order = {"root": root.decode("latin-1"), "trust_dir": str(trust_dir), "told": [str(path) for path in told]}
    given = json.dumps(order).encode() + b"\n" + payload
    try:
        said = run_child("edge_agent.updates.verifier", given=given, deadline_s=DEADLINE_S)
    except DeadlineError as error:
        raise TransientError(f"the offer was not verified within {DEADLINE_S:g} s") from error
    return SignedTargets(parse_json(said, dict[str, SignedTarget], max_bytes=_SAID_MAX_BYTES))


def main() -> int:
    """Verify the offer on standard input; print its targets, or why it is refused; return the exit code."""
    bound_this_process(memory_bytes=_MEMORY_BYTES, cpu_s=_CPU_S, writes=True)
    from edge_agent.updates.fetcher import open_offer

    head, _, payload = sys.stdin.buffer.read().partition(b"\n")
    order: dict[str, Any] = json.loads(head)
    try:
        targets = open_offer(
            payload,
            root=order["root"].encode("latin-1"),
            trust_dir=Path(order["trust_dir"]),
            told=[Path(path) for path in order["told"]],
        )
    except StalledError as error:
        print(error)
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}")
        return 1
    sys.stdout.buffer.write(build_json(targets.signed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
