"""What a device learns from: samples its user or a sensor hands in, and answered requests whose truth came later."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from edge_agent.config import AgentSettings
from edge_agent.errors import RequestError
from edge_agent.forgetting import Forgotten, build_fields, build_wish
from edge_agent.samples.feedback import FeedbackBuffer, parse_target
from edge_agent.samples.fields import FieldRules
from edge_agent.samples.keeper import SampleKeeper
from edge_agent.samples.keys import fetch_key, load_key
from edge_agent.samples.sealing import Array
from edge_agent.samples.store import Retention
from edge_agent.training.local import forget_local
from models.contract.manifest import ModelManifest
from models.tensors.features import RowError, build_inputs


class Collector:
    """Decides what is kept on this device, and in what form; may be used from several threads."""

    def __init__(self, settings: AgentSettings, *, get_manifest: Callable[[], ModelManifest | None]) -> None:
        """Prepare; no file is opened before the first sample.

        Args:
            settings: Of the device.
            get_manifest: Of the model that answers; None before there is one.
        """
        self._get_manifest = get_manifest
        self._rules = build_rules(settings)
        self._forget_by = settings.samples.forget_by
        self._lock = threading.Lock()  # nothing comes back that was forgotten while it was on its way
        self._training_dir = settings.training_dir
        self.keeper = _build_keeper(settings)
        self._feedback: FeedbackBuffer | None = None
        if settings.samples.consent:
            self._feedback = FeedbackBuffer(
                max_count=settings.samples.feedback_max,
                ttl_s=settings.samples.feedback_ttl_s,
                keep_share=settings.samples.keep_share,
            )

    def build_inputs(self, rows: Sequence[Any]) -> dict[str, Array]:
        """Return raw rows as the model's inputs, by the owner's rules first and the model's features then.

        Raises:
            RequestError: There is no model yet, or a row is of no use to it.
        """
        return build_model_inputs(self._find_manifest(), rows, self._rules)

    def add(self, samples: Sequence[tuple[Array | Mapping[str, Any], Array | str]]) -> list[int]:
        """Keep samples; all of them, durable on return, or none.

        Args:
            samples: (x, y) each; x is an array or a raw row by column, y an array or a label.

        Returns:
            Their ids, in order.

        Raises:
            RequestError: Not what the model takes; columns without names where the owner has rules for them; no room.
        """
        if self._rules and not all(isinstance(x, Mapping) for x, _ in samples):
            raise RequestError("expected values by the names of their columns: this device has rules for them")
        raw = [x for x, _ in samples if isinstance(x, Mapping)]
        built = iter(self._build_only_input(raw)) if raw else iter(())
        labels = self._find_manifest().labels if any(isinstance(y, str) for _, y in samples) else ()
        return self.keeper.add(
            [
                (
                    next(built) if isinstance(x, Mapping) else x,
                    parse_target(y, 1, spec=None, labels=labels)[0] if isinstance(y, str) else y,
                )
                for x, y in samples
            ],
            [build_fields(x, self._rules, self._forget_by) if isinstance(x, Mapping) else {} for x, _ in samples],
        )

    @property
    def remember(self) -> Callable[[str, Mapping[str, Array]], None] | None:
        """To be told of each answered request, with an id that nobody can guess; None without the owner's consent."""
        return self._feedback.remember if self._feedback else None

    def add_feedback(self, request_id: str, target: object) -> list[int]:
        """Keep an answered request with its truth; durable on return.

        Returns:
            Ids of the new samples; none for a request that the draw left out.

        Raises:
            RequestError: No consent; not a request that waits; no target of it; no room.
        """
        if self._feedback is None:
            raise RequestError(
                "feedback is not kept on this device: its owner can allow it with `consent = true` in [samples]",
                status=403,
            )
        manifest = self._get_manifest()
        with self._lock:
            samples = self._feedback.join(
                request_id,
                target,
                spec=manifest.training.target if manifest and manifest.training else None,
                labels=manifest.labels if manifest else (),
            )
            try:
                return self.keeper.add(samples) if samples else []
            except RequestError:
                self._feedback.restore(request_id, samples)
                raise

    def forget(self, ids: Sequence[int | str] = (), where: Mapping[str, Any] | None = None) -> Forgotten:
        """Forget samples, what waits to become one, and local parameters; no byte of them is in any file on return.

        Args:
            ids: Of samples (numbers) and of answered requests (text).
            where: Forget those whose columns all have these values; requests of which nobody can tell go, too.
                Without `ids` and `where` everything is forgotten.

        Raises:
            RequestError: Nothing can be found by such a column.
            StalledError: The samples cannot be opened.
            TransientError: Not all could be forgotten now.
        """
        with self._lock:
            if where:
                wish = build_wish(where, manifest=self._get_manifest(), rules=self._rules, forget_by=self._forget_by)
                waiting = self._feedback.forget(lambda _, x: wish.may_be_meant(x)) if self._feedback else 0
                forgotten = self.keeper.forget(self.keeper.find(wish.is_meant))
            else:
                waiting = self._feedback.forget(lambda name, _: not ids or name in ids) if self._feedback else 0
                forgotten = self.keeper.forget([row for row in ids if isinstance(row, int)] if ids else None)
            forget_local(self._training_dir)  # last: a round that begins now finds neither
        return Forgotten(forgotten=forgotten, waiting=waiting, kept=self.keeper.count())

    def _find_manifest(self) -> ModelManifest:
        manifest = self._get_manifest()
        if manifest is None:
            raise RequestError("this device has no model yet, which could say what columns and labels mean", status=503)
        return manifest

    def _build_only_input(self, rows: Sequence[Any]) -> Array:
        inputs = self.build_inputs(rows)
        if len(inputs) != 1:
            raise RequestError(f"a sample is of one input; this model has {', '.join(inputs)}")
        return next(iter(inputs.values()))


def _build_keeper(settings: AgentSettings) -> SampleKeeper:
    samples = settings.samples

    def load_samples_key(may_make: bool) -> bytes:  # noqa: FBT001 - a callback
        if samples.key_command is not None:
            return fetch_key(samples.key_command)
        return load_key(settings.state_dir / "samples.key", may_make=may_make)

    return SampleKeeper(
        settings.samples_path,
        model=settings.model,
        load_key=load_samples_key,
        retention=Retention(
            max_count=samples.max_count,
            keep_s=None if samples.keep_days is None else samples.keep_days * 86_400,
            forgets_oldest=samples.when_full == "forget_oldest",
        ),
    )


def build_rules(settings: AgentSettings) -> FieldRules:
    """Return the owner's rules for raw rows."""
    return FieldRules(settings.samples.fields, partial(load_key, settings.state_dir / "fields.key"))


def build_model_inputs(
    manifest: ModelManifest, rows: Sequence[Any], rules: FieldRules | None = None
) -> dict[str, Array]:
    """Return raw rows as the inputs of the model, by name: the one way from a row to a tensor on a device.

    Raises:
        RequestError: A row is of no use to the model; it is counted from 0.
        StalledError: The device's key cannot be read.
    """
    kept: list[Any] = []
    for number, row in enumerate(rows):
        try:
            kept.append(rules.apply(row) if rules and isinstance(row, Mapping) else row)
        except ValueError as error:
            raise RequestError(f"row {number}: {error}") from error
    try:
        return build_inputs(manifest.features, manifest.inputs, kept)
    except RowError as error:
        raise RequestError(str(error)) from error
