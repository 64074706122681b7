"""Gives freed memory back to the system: after a change of models the C library would keep what the old one had."""

import ctypes
from typing import Final

_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone


def give_back() -> None:
    """Release free heap pages; takes a few ms, not holding the interpreter."""
    if _TRIM is not None:
        _TRIM(0)
