"""The store of a device, as another program of the device opens it."""

from pathlib import Path

from edge_agent.samples.keys import load_key
from edge_agent.samples.store import SampleStore, open_samples


def open_device_samples(state_dir: Path, model: str = "tiny") -> SampleStore:
    """Return the store in `state_dir`, unlocked with the key beside it, which is made if there is none."""
    return open_samples(state_dir / "samples.db", model=model, key=load_key(state_dir / "samples.key"))
