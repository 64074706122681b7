"""Joins the truth to an earlier request: its inputs wait in memory, and only both together become samples."""

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_agent.errors import RequestError
from edge_agent.samples.sealing import Array, Sample
from models.tensors.spec import DTYPES, TensorSpec

MEMORY_MAX_BYTES = 8 * 1024 * 1024  # of waiting inputs: a tenth of what the whole agent may take
_GONE_PER_WAITING = 4  # ids remembered after their inputs are gone, so that a late truth is told why it is late


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """What one answer was made from; `x` is None if the draw said that it is not kept."""

    remembered_s: float
    rows: int
    x: Array | None

    @property
    def size_bytes(self) -> int:
        return 0 if self.x is None else self.x.nbytes


class FeedbackBuffer:
    """Inputs of answered requests, bounded by count, bytes and age; may be used from several threads."""

    def __init__(
        self,
        *,
        max_count: int,
        ttl_s: float,
        keep_share: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Begin empty.

        Args:
            max_count: Requests that wait at most; the oldest gives way.
            ttl_s: How long each of them waits.
            keep_share: Share of the requests that may become samples, drawn when they are answered.
            clock: In s, from any beginning.
            draw: Gives values in [0, 1).
        """
        self._max_count = max_count
        self._ttl_s = ttl_s
        self._keep_share = keep_share
        self._clock = clock
        self._draw = draw
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._gone: OrderedDict[str, str] = OrderedDict()
        self._size_bytes = 0

    def remember(self, request_id: str, inputs: Mapping[str, Array]) -> None:
        """Let the inputs of an answered request wait for the truth; a sample is of one tensor of numbers."""
        x = next(iter(inputs.values()))
        if len(inputs) != 1 or x.dtype.name not in DTYPES:
            return
        is_kept = self._draw() < self._keep_share
        entry = _Waiting(
            remembered_s=self._clock(),
            rows=len(x),
            x=x.copy() if is_kept and x.nbytes <= MEMORY_MAX_BYTES else None,  # a view would hold the whole body
        )
        with self._lock:
            self._put(request_id, entry)
            self._remove_old(entry.remembered_s)

    def join(
        self, request_id: str, target: object, *, spec: TensorSpec | None = None, labels: Sequence[str] = ()
    ) -> list[Sample]:
        """Return one sample a row of the request, and forget it; none if the draw said that it is not kept.

        Args:
            request_id: As it was given to `remember`.
            target: Truth of the only row, or one a row: a number, a label, or lists of them.
            spec: What the model trains on, if it does.
            labels: Names of its classes.

        Raises:
            RequestError: 404, an id that never was; 410, one that waits no more; 400, no target of this request.
        """
        with self._lock:
            self._remove_old(self._clock())
            entry = self._find(request_id)
            y = parse_target(target, entry.rows, spec=spec, labels=labels)
            self._remove(request_id, "it has its truth already")
        return [] if entry.x is None else list(zip(entry.x, y, strict=True))

    def restore(self, request_id: str, samples: Sequence[Sample]) -> None:
        """Let a request wait again, whose `samples` could not be kept."""
        if samples:
            x = np.stack([sample[0] for sample in samples])
            with self._lock:
                self._gone.pop(request_id, None)
                self._put(request_id, _Waiting(remembered_s=self._clock(), rows=len(x), x=x))

    def forget(self, is_meant: Callable[[str, Array], bool]) -> int:
        """Let requests wait no more whose id and inputs `is_meant` says yes to one row of; return how many there were."""
        with self._lock:
            meant = [
                name
                for name, entry in self._waiting.items()
                if entry.x is not None and any(is_meant(name, row) for row in entry.x)
            ]
            for name in meant:
                self._remove(name, "its owner had it forgotten")
        return len(meant)

    def _find(self, request_id: str) -> _Waiting:
        entry = self._waiting.get(request_id)
        if entry is not None:
            return entry
        if reason := self._gone.get(request_id):
            raise RequestError(f"request {request_id!r:.80} waits for its truth no more: {reason}", status=410)
        raise RequestError(f"there was no request {request_id!r:.80}: expected the id of an answer", status=404)

    def _put(self, request_id: str, entry: _Waiting) -> None:
        if request_id in self._waiting:
            self._size_bytes -= self._waiting.pop(request_id).size_bytes
        self._waiting[request_id] = entry
        self._size_bytes += entry.size_bytes
        while len(self._waiting) > self._max_count or self._size_bytes > MEMORY_MAX_BYTES:
            self._remove(next(iter(self._waiting)), "newer requests took its place")

    def _remove_old(self, now_s: float) -> None:
        while self._waiting:
            request_id, entry = next(iter(self._waiting.items()))
            if now_s - entry.remembered_s < self._ttl_s:
                return
            self._remove(request_id, f"it is older than {self._ttl_s:g} s")

    def _remove(self, request_id: str, reason: str) -> None:
        self._size_bytes -= self._waiting.pop(request_id).size_bytes
        self._gone[request_id] = reason
        while len(self._gone) > _GONE_PER_WAITING * self._max_count:
            self._gone.popitem(last=False)


def parse_target(target: object, rows: int, *, spec: TensorSpec | None, labels: Sequence[str]) -> Array:
    """Return `target` as one value a row, shape (rows, ...); labels become the numbers of their classes.

    Raises:
        RequestError: Not what the model trains on, or not as many as there are rows.
    """
    array = _to_array(_replace_labels(target, labels))
    if spec is None:
        array = array[None] if rows == 1 and (array.ndim == 0 or len(array) != 1) else array
        if array.ndim == 0 or len(array) != rows:
            raise RequestError(f"expected {rows} targets, one a row of the request, got shape {array.shape}")
        return array
    expected = (rows, *spec.row_shape)
    if array.shape != expected and not (rows == 1 and array.shape == spec.row_shape):
        raise RequestError(f"expected a target of shape {expected}, got {array.shape}")
    with np.errstate(invalid="ignore", over="ignore"):  # what does not survive is found below
        converted = array.astype(spec.dtype)
    survived = np.isfinite(converted) if converted.dtype.kind == "f" else converted == array
    if not survived.all():
        raise RequestError(f"expected a target of finite {spec.dtype} values")
    if labels and converted.dtype.kind in "iu" and not ((converted >= 0) & (converted < len(labels))).all():
        raise RequestError(f"expected classes in 0..{len(labels) - 1}, or their labels")
    return converted.reshape(expected)


def _replace_labels(target: object, labels: Sequence[str]) -> Any:
    if isinstance(target, list):
        return [_replace_labels(item, labels) for item in target]
    if not isinstance(target, str):
        return target
    if target not in labels:
        known = ", ".join(labels) if labels else "none: this model names no classes"
        raise RequestError(f"label {target!r:.80}: expected one of {known:.400}")
    return labels.index(target)


def _to_array(value: Any) -> Array:
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"expected a target of numbers or labels in one shape: {error}") from error
    if array.dtype.name not in DTYPES or array.size == 0:
        raise RequestError("expected a target of numbers or labels")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestError("expected a target of finite numbers")
    return array
