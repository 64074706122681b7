"""What `fl-server simulate` says to a process that plays some of its devices, on its standard input.

    in   one `SimulationJob`, a line; then for every round one `VirtualRound`, a line, and the round's parameters
    out  for every round one update for each of its envelopes, in their order: its length in 4 bytes, then as it travels

Parameters are little-endian float32, 4 bytes a parameter, without those that are local.
"""

from dataclasses import dataclass

UPDATE_LENGTH_BYTES = 4  # little-endian, before each update


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationJob:
    """What one process plays. Paths are text, since JSON has no other.

    Attributes:
        graph_dir: Folder with manifest.json and the training graphs of the version that is trained.
        definition: `FILE.py:NAME` or `package.module:NAME` of the model's definition, for the Opacus engine.
        coordinator_key: Ed25519 public key that signs train orders, its 32 bytes.
        samples: The npz file of x and y that each device trains on, by device id.
        local_dir: Where each device keeps its local parameters, as DEVICE.f32, little-endian float32.
        seed: All randomness follows from it; None draws from the operating system, as a real device does.
    """

    fleet: str
    graph_dir: str
    definition: str | None = None
    coordinator_key: bytes  # base64 in JSON
    samples: dict[str, str]
    local_dir: str
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualRound:
    """One round's train orders, as real devices get them: signed envelopes by device id."""

    envelopes: dict[str, bytes]  # base64 in JSON
