"""What the local API asks of an agent, where only the models matter."""

from edge_agent.http.app import Device
from edge_agent.http.ports import Models


async def _build_nothing() -> dict[str, object]:
    return {}


def build_device(models: Models) -> Device:
    """Return a device that keeps nothing and tells nothing."""
    return Device(
        agent_version="1",
        models=models,
        add_samples=lambda _samples: [],
        build_inputs=lambda _rows: {},
        get_status=_build_nothing,
        get_privacy=dict,
        get_metrics=str,
        record_latency=lambda _seconds: None,
        record_failure=lambda: None,
        add_feedback=lambda _request_id, _target: [],
        forget=lambda _ids, _where: {},
    )
