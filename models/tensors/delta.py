"""From one version's weights to the next one's: the difference of each byte modulo 256, compressed.

Versions of one template hold the same tensors at the same places, and a step of int8 is a byte: after a round most
differences are a few steps, which compress far better than the weights themselves.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import zstandard

_LEVEL = 19
_WINDOW_MAX_BYTES = 1 << 23  # what level 19 uses; bounds the memory of who decompresses


def build_delta(base: bytes, result: bytes) -> bytes:
    """Return what leads from `base` to `result`; raises ValueError if they are not as long as each other."""
    if len(base) != len(result):
        raise ValueError(f"no delta leads from {len(base)} bytes to {len(result)}")
    difference = np.frombuffer(result, np.uint8) - np.frombuffer(base, np.uint8)
    return zstandard.ZstdCompressor(level=_LEVEL).compress(difference.tobytes())


def apply_delta(base: BinaryIO, delta: bytes, *, size_bytes: int, block_bytes: int) -> Iterator[bytes]:
    """Yield the result in blocks of `block_bytes`, the last one shorter; what is not asked for is not decompressed.

    Args:
        base: Read from where it stands.
        delta: As `build_delta` made it, or anything at all.
        size_bytes: Of the result, which nothing makes longer.
        block_bytes: > 0.

    Raises:
        ValueError: No delta, or one of another length than base and result.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX_BYTES)
    try:
        with decompressor.stream_reader(io.BytesIO(delta)) as differences:
            for start in range(0, size_bytes, block_bytes):
                length = min(block_bytes, size_bytes - start)
                block, difference = base.read(length), differences.read(length)
                if not len(block) == len(difference) == length:
                    raise ValueError(f"delta or base end before the {size_bytes} bytes of the result")
                yield (np.frombuffer(block, np.uint8) + np.frombuffer(difference, np.uint8)).tobytes()
            if differences.read(1):
                raise ValueError(f"the delta goes on behind the {size_bytes} bytes of the result")
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"no delta: {error}") from error
