"""What a device learns from: samples its user hands in, and answered requests whose truth came later."""

from collections.abc import Callable, Mapping

from edge_agent.config import AgentSettings
from edge_agent.errors import RequestError
from edge_agent.samples.feedback import FeedbackBuffer
from edge_agent.samples.keeper import SampleKeeper
from edge_agent.samples.store import Array
from models.contract.manifest import ModelManifest


class Collector:
    """Decides what is kept on this device; may be used from several threads."""

    def __init__(self, settings: AgentSettings, *, get_manifest: Callable[[], ModelManifest | None]) -> None:
        """Prepare; no file is opened before the first sample.

        Args:
            settings: Of the device.
            get_manifest: Of the model that answers; None before there is one.
        """
        self._get_manifest = get_manifest
        self.keeper = SampleKeeper(settings.samples_path, max_count=settings.samples.max_count)
        self._feedback: FeedbackBuffer | None = None
        if settings.samples.consent:
            self._feedback = FeedbackBuffer(
                max_count=settings.samples.feedback_max,
                ttl_s=settings.samples.feedback_ttl_s,
                keep_share=settings.samples.keep_share,
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
