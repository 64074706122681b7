"""A staged version answers the champion's requests in the shadow, in a process of its own, and is judged by it.

What it crashes or holds up there costs no answer. What is found derives from private data: the caller decides who sees it.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from edge_agent.children import DeadlineError
from edge_agent.errors import StalledError
from edge_agent.inference.backend import Array
from edge_agent.inference.engine import Engine
from edge_agent.inference.model import load_manifest
from edge_agent.inference.shadow import Shadow, ShadowSnapshot
from edge_agent.inference.understudy import Answer
from edge_agent.partner import Partner
from models.contract.manifest import ModelManifest
from models.contract.terms import ProbationRules
from models.tensors.packed import pack_tensors, unpack_tensors

log = logging.getLogger(__name__)

REQUEST_DEADLINE_S = 20.0  # a version that needs more for one request hangs
_TIMED_MAX = 1000  # the newest runs, which the medians are taken of
_ROOM_BYTES = 1024 * 1024  # of an answer, beyond its numbers


class Understudy:
    """A version in a child process; what a `Shadow` compares."""

    def __init__(
        self,
        directories: tuple[Path, ...],
        manifest: ModelManifest,
        *,
        on_failed: Callable[[], None],
        deadline_s: float,
    ) -> None:
        """Load it; blocks.

        Args:
            directories: Of the version, and of the champion if it is to be timed beside it.
            manifest: The version's.
            on_failed: Called once, on any thread, when it has not answered what it should have.
            deadline_s: For one answer.

        Raises:
            StalledError: It does not load.
            TransientError: This machine has no process or no time for it now.
        """
        self.problem = ""
        self._manifest, self._on_failed = manifest, on_failed
        self._timed: deque[tuple[float, float]] = deque(maxlen=_TIMED_MAX)
        self._partner = Partner("edge_agent.inference.understudy", *map(str, directories), deadline_s=deadline_s)
        try:
            self._partner.ask(b"", answer_max_bytes=_ROOM_BYTES)
        except BaseException:
            self._partner.close()
            raise

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Accept what the champion has accepted: both take the same tensors."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name; raises StalledError, from the first failure on always."""
        if self.problem:
            raise StalledError(self.problem)
        try:
            return self._ask(inputs)
        except (StalledError, DeadlineError, msgspec.MsgspecError, ValueError) as error:
            self.problem = str(error) or type(error).__name__
            self._on_failed()
            raise StalledError(self.problem) from error

    def compute_ratio(self) -> float | None:
        """Return its median latency relative to the champion's, None if that was not measured."""
        timed = tuple(self._timed)
        if not timed:
            return None
        ours_s, theirs_s = ([pair[place] for pair in timed] for place in (0, 1))
        return statistics.median(ours_s) / statistics.median(theirs_s)

    def close(self) -> None:
        """End the child."""
        self._partner.close()

    def _ask(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(next(iter(inputs.values())))
        row_bytes = sum(math.prod(spec.row_shape) * spec.numpy_dtype.itemsize for spec in self._manifest.outputs)
        said = self._partner.ask(pack_tensors(inputs), answer_max_bytes=rows * row_bytes + _ROOM_BYTES)
        answer = msgspec.msgpack.decode(said, type=Answer)
        if answer.outputs is None:
            raise StalledError(answer.problem)
        outputs = unpack_tensors(answer.outputs, self._manifest.outputs)
        if (found := len(next(iter(outputs.values())))) != rows:
            raise StalledError(f"it answers {found} rows to {rows}")
        if answer.champion_s is not None:
            self._timed.append((answer.taken_s, answer.champion_s))
        return outputs


class Rehearsal:
    """A version beside the champion of `engine` until `close`."""

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        champion_dir: Path,
        rules: ProbationRules,
        on_failed: Callable[[], None],
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        """Begin; blocks.

        Args:
            engine: Whose champion's requests are mirrored.
            directory: Of the version.
            champion_dir: Of the champion.
            rules: What the version must show.
            on_failed: As `Understudy`.
            deadline_s: For one answer.

        Raises:
            AgentError: As `Understudy`.
        """
        self._engine, self._rules, self._patience_s = engine, rules, 5 * deadline_s
        directories = (directory,) if rules.max_latency_ratio is None else (directory, champion_dir)
        manifest = load_manifest(directory)
        self._understudy = Understudy(directories, manifest, on_failed=on_failed, deadline_s=deadline_s)
        self._shadow = Shadow(self._understudy)
        champion = engine.active
        if champion is not None and _is_alike(manifest, champion.manifest):
            engine.rehearse(self._shadow)
            log.info("version %d answers in the shadow", manifest.version)
        else:
            log.warning(
                "version %d takes or gives other tensors than the champion: it is not compared", manifest.version
            )

    def judge(self) -> str | None:
        """End the comparisons, and return why the version does not pass, in numbers; None if it does."""
        self._engine.rehearse(None)
        self._shadow.finish(self._patience_s)
        found, ratio = self._shadow.snapshot(), self._understudy.compute_ratio()
        log.info("after %d rows, %d of which agree, latency %s: %s", found.rows, found.agreeing, ratio, found)
        return self._understudy.problem or judge(self._rules, found, ratio)

    def close(self) -> None:
        """End it, judged or not."""
        self._engine.rehearse(None)
        self._understudy.close()
        self._shadow.close()


def judge(rules: ProbationRules, found: ShadowSnapshot, ratio: float | None) -> str | None:
    """Return in numbers why what was `found` does not pass `rules`, None if it does.

    Args:
        rules: What the version must show.
        found: By the comparisons; without any it has nothing to show and passes.
        ratio: Of its median latency to the champion's; None if that was not measured.
    """
    if found.failures:
        return f"{found.failures} requests failed that the champion answered"
    if found.rows and found.agreeing < rules.min_agreement * found.rows:
        share = found.agreeing / found.rows
        return f"it agrees in {share:.4f} of {found.rows} rows, at least {rules.min_agreement} is asked for"
    if ratio is not None and rules.max_latency_ratio is not None and ratio > rules.max_latency_ratio:
        return f"its median latency is {ratio:.1f} times the champion's, at most {rules.max_latency_ratio} is allowed"
    return None


def _is_alike(ours: ModelManifest, theirs: ModelManifest) -> bool:
    return (ours.inputs, ours.outputs) == (theirs.inputs, theirs.outputs)
