"""A node that answers with a part of the way to a known solution, or with nothing: HOST:PORT CA KEY FRACTION|silent."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from edge_agent.training.node import serve
from models.tensors.layout import build_vector_bytes

SOLUTION = np.array([-2, 0, 0, 0, 2, 0, 0, 0], np.float32)


def main() -> None:
    address, ca, key, fraction = sys.argv[1:]
    serve(
        superlink=address,
        ca_path=Path(ca),
        node_key_path=Path(key),
        poll_interval_s=0.2,
        idle_timeout_s=60.0,
        handle=lambda parameters, _envelope: (
            None if fraction == "silent" else build_vector_bytes((SOLUTION - parameters) * np.float32(fraction))
        ),
        on_joined=lambda: None,
    )


if __name__ == "__main__":
    main()
