"""A staged version in a process that may die, answering what the champion has answered; bounded as the sandbox.

`python -m edge_agent.inference.understudy VERSION_DIR [CHAMPION_DIR]`, with CHAMPION_DIR to time both side by side.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_agent.children import extend_cpu_limit
from edge_agent.errors import AgentError
from edge_agent.inference.model import ServedModel, load_version
from edge_agent.inference.sandbox import CPU_S, bound_for
from edge_agent.inference.trial import time_run
from edge_agent.partner import build_message, read_message
from models.tensors.packed import pack_tensors, unpack_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the child says of one request.

    Attributes:
        outputs: Packed; None if it has failed.
        problem: Why it has failed.
        taken_s: How long it took.
        champion_s: How long the champion took, just before or after; None if it is not timed.
    """

    outputs: bytes | None = None
    problem: str = ""
    taken_s: float = 0.0
    champion_s: float | None = None


def main(directories: list[Path]) -> int:
    """Answer the messages on standard input until there are no more; the first answer, to anything, is that it loaded."""
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what a library prints must not pass for an answer
    bound_for(*directories)
    model, *champions = (load_version(directory) for directory in directories)
    while (message := read_message(sys.stdin.buffer)) is not None:
        extend_cpu_limit(CPU_S)
        answer = _answer(model, champions, message) if message else Answer()
        answers.write(build_message(msgspec.msgpack.encode(answer)))
        answers.flush()
    return 0


def _answer(model: ServedModel, champions: list[ServedModel], message: bytes) -> Answer:
    inputs = unpack_tensors(message, model.manifest.inputs)
    try:
        champion_s = time_run(champions[0], inputs)[0] if champions else None
        taken_s, outputs = time_run(model, inputs)
    except AgentError as error:
        return Answer(problem=str(error))
    return Answer(outputs=pack_tensors(outputs), taken_s=taken_s, champion_s=champion_s)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
