"""What the parts that follow releases are told."""

from dataclasses import dataclass
from pathlib import Path

from models.contract.wave import Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdaterSettings:
    """What an updater is told.

    Attributes:
        device_id: Decides whether this device is in a wave.
        traits: What releases may ask of it.
        trains: Whether this device needs the graphs it trains with.
        deadline_s: For the fetch of one release, all of its files together.
        window: Chunks asked for at once.
        trial_timeout_s: A version that is not healthy by then hangs.
        retry_delay_s: Before the first retry.
        shares_quality: Whether others may know what a version showed on this device's own requests.
        steady_s: A challenger that has served for so long has all its tries again.
    """

    fleet: str
    model: str
    device_id: str
    traits: Traits
    state_dir: Path
    trains: bool
    shares_quality: bool = False
    deadline_s: float = 120.0
    window: int = 4
    trial_timeout_s: float = 60.0
    retry_delay_s: float = 5.0
    steady_s: float = 300.0

    @property
    def order_key_path(self) -> Path:
        """Where the verified key that signs orders to devices is kept."""
        return self.state_dir / "coordinator.pem"
