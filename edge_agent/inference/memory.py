"""Gives freed memory back to the system: after a change of models the C library would keep what the old one had."""

import ctypes
import gc


def give_back() -> None:
    """Release free heap pages; a few ms, and only worth it after something large was freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
