"""Memory of a process that sends or receives much: what is freed stays with it, up to a bound."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_LARGEST_MESSAGE = 32 * 1024 * 1024


def keep_freed_memory(max_bytes: int) -> None:
    """glibc gives large freed blocks back to the system and takes fresh pages for the next message, which costs as much
    as receiving it. Called once, before the first message. Does nothing with another C library.

    Args:
        max_bytes: Freed memory beyond this is given back nevertheless.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MESSAGE)
        mallopt(_M_TOP_PAD, max_bytes // 16)
        mallopt(_M_TRIM_THRESHOLD, max_bytes)
