"""The golden samples of a version: a few rows, and what its graph answered to them where it was packaged.

They are a file of the version, named and signed by its manifest. A device on which the graph answers otherwise does not
serve it.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import zstandard

from models.contract.errors import MalformedError
from models.contract.manifest import ModelManifest
from models.contract.offer import ZSTD_LEVEL
from models.tensors.packed import Arrays, pack_tensors, unpack_tensors

_UNPACKED_MAX_BYTES = 1024 * 1024  # a packaged file has a few KiB; bounds what it can become


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """Golden samples.

    Attributes:
        inputs: By name, as the manifest says.
        outputs: What the packaged graph answered.
        tolerance: Mean difference that is rounding, as a share of the outputs' spread; > 0.
    """

    inputs: Arrays
    outputs: Arrays
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    inputs: bytes
    outputs: bytes
    tolerance: float


def build_golden(golden: Golden) -> bytes:
    """Return the file that holds `golden`."""
    file = _File(inputs=pack_tensors(golden.inputs), outputs=pack_tensors(golden.outputs), tolerance=golden.tolerance)
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(msgspec.msgpack.encode(file))


def parse_golden(data: bytes, manifest: ModelManifest) -> Golden:
    """Return the golden samples in `data`, of the version that `manifest` is; raises MalformedError."""
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data) as reader:
            unpacked = reader.read(_UNPACKED_MAX_BYTES + 1)
        if len(unpacked) > _UNPACKED_MAX_BYTES:
            raise ValueError(f"more than {_UNPACKED_MAX_BYTES} bytes")
        file = msgspec.msgpack.decode(unpacked, type=_File)
        golden = Golden(
            inputs=unpack_tensors(file.inputs, manifest.inputs),
            outputs=unpack_tensors(file.outputs, manifest.outputs),
            tolerance=file.tolerance,
        )
    except (zstandard.ZstdError, msgspec.MsgspecError, ValueError, MemoryError) as error:
        raise MalformedError(f"golden samples: {error}") from error
    if not golden.tolerance > 0:
        raise MalformedError(f"golden samples: tolerance is {golden.tolerance}, must be > 0")
    return golden


def explain_straying(golden: Golden, answers: Arrays) -> str | None:
    """Return why `answers` to the golden inputs are not the golden outputs, None if they are, but for rounding.

    A row's largest value must be at the same place, unless two are closer than the tolerance; numbers that are not
    floats, and strings, must be the same.
    """
    for name, expected in golden.outputs.items():
        found = answers[name].reshape(len(expected), -1)
        ours = expected.reshape(len(expected), -1)
        if ours.dtype.kind != "f":
            if not np.array_equal(found, ours):
                return f"output {name!r} of the golden samples is another one"
            continue
        wide, exact = found.astype(np.float64), ours.astype(np.float64)
        spread = max(float(exact.std()), 0.01 * float(np.abs(exact).max()), np.finfo(np.float64).tiny)
        room = golden.tolerance * spread
        if not (strayed := float(np.abs(wide - exact).mean())) <= room:  # NaN strays too
            return f"output {name!r} of the golden samples strays by {strayed / spread:.3f} of its spread"
        there = np.take_along_axis(exact, wide.argmax(axis=1)[:, None], axis=1)[:, 0]
        if others := int((exact.max(axis=1) - there > room).sum()):
            return f"output {name!r} is largest at another place in {others} of {len(exact)} golden samples"
    return None
