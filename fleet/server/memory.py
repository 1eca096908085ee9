"""Memory of a process that receives much: what is freed stays with it, up to a bound."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def keep_freed_memory(max_bytes: int = 256 * 1024 * 1024) -> None:
    """glibc gives large freed blocks back to the system and takes fresh pages for the next message, which costs as much
    as receiving it. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (_M_MMAP_THRESHOLD, 32 * 1024 * 1024),
            (_M_TOP_PAD, 16 * 1024 * 1024),
            (_M_TRIM_THRESHOLD, max_bytes),
        ):
            mallopt(option, value)
