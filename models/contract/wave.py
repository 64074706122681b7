"""Which devices a released version is for: a part of its signed terms, decided by each device for itself.

The hash is keyed by the rollout, so that it is not always the same devices that go first. A wave that grows keeps the
devices it had. What a wave leaves out follows the release that was there before.
"""

import hashlib
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a release may ask of a device.

    Attributes:
        hardware: As `uname -m` says.
        runtimes: Which graphs it can open.
        agent: Version of its agent.
        region: As its owner has configured it; "" for none.
    """

    hardware: str
    runtimes: tuple[Literal["onnx", "tflite"], ...]
    agent: str
    region: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a device must be; what is empty asks for nothing.

    Attributes:
        hardware: One of these.
        agent: This version or a later one.
        regions: One of these.
    """

    hardware: tuple[str, ...] = ()
    agent: str = ""
    regions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """The devices that are listed, or hashed below the percentage.

    Attributes:
        key: Of the hash; of this rollout alone.
        percentage: 0 to 100.
        devices: Ids of those that are in it whatever their hash.
    """

    key: str
    percentage: Decimal
    devices: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if not 1 <= len(self.key.encode()) <= 64:
            raise ValueError(f"key has {len(self.key.encode())} bytes, must have 1 to 64")
        if not self.percentage.is_finite() or not 0 <= self.percentage <= 100:
            raise ValueError(f"percentage is {self.percentage}, must be in 0..100")


def is_in_wave(device_id: str, wave: Wave) -> bool:
    """Return whether the device is in `wave`."""
    return device_id in wave.devices or 100 * compute_place(device_id, wave.key) < Fraction(wave.percentage)


def compute_place(device_id: str, key: str) -> Fraction:
    """Return where in a rollout of this key the device comes, in [0, 1)."""
    digest = hashlib.blake2b(device_id.encode(), digest_size=8, key=key.encode()).digest()
    return Fraction(int.from_bytes(digest, "big"), 1 << 64)


def find_unmet(device: Traits, asked: Requirements) -> str | None:
    """Return in words what `device` is not, None if it meets the requirements."""
    if asked.hardware and device.hardware not in asked.hardware:
        return f"it is for hardware {' or '.join(asked.hardware)}, this is {device.hardware}"
    if asked.agent and _order(device.agent) < _order(asked.agent):
        return f"it needs agent {asked.agent} or later, this is {device.agent}"
    if asked.regions and device.region not in asked.regions:
        return f"it is for region {' or '.join(asked.regions)}, this is in {device.region or 'none'}"
    return None


def _order(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with; "1.10" comes after "1.9", and is "1.10.0"."""
    numbers: list[int] = []
    for part in version.split("."):
        if not (part.isascii() and part.isdecimal()):
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
