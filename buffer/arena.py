"""Byte arrays that rows lie in: mapped segments.

While the whole log fits into the budget of resident pages, all rows are read through the maps, at the speed of memory.
When it does not, large rows (raw frames) are read from the page cache with ``preadv``: as fast as out of a map whose pages
must be faulted in first, and they do not become resident. Small rows still go through the maps, and now and then the pages
are handed back; they stay in the page cache.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fleet.errors import StorageError

_SMALL_ROWS = 256 << 20  # bytes that small rows make resident before they are handed back; a batch faults in about 50 MB
LARGE_ROW = 4096  # bytes from which on a row is copied by itself
_FAULT_BITS = 16  # 64 KiB become resident around a row that is read through a map


class Arena:
    """Bytes with an address in this process. Lives as long as anything points to it.

    Args:
        bytes: Read-only uint8.
        path: The file that they are, from its start on; None for memory.
        map: What can hand back their pages; None for memory.
    """

    def __init__(self, bytes: np.ndarray, path: Path | None = None, map: mmap.mmap | None = None) -> None:
        self.bytes, self._map = bytes, map
        self.path = path
        self._faulted = np.zeros((len(bytes) >> _FAULT_BITS) + 1, bool)
        self._fd = -1
        if path is not None and hasattr(os, "preadv"):
            with contextlib.suppress(FileNotFoundError):  # retired since it was mapped
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._fd)

    def read_rows(self, at: list[int], out: memoryview, rows: list[int], row_bytes: int, fits: bool) -> None:
        """Copies ``row_bytes`` from each offset on into a row of ``out``, through the map where the log ``fits``.

        Raises:
            StorageError: The disk cannot be read, or the file has become shorter.
        """
        if fits or self._fd < 0:
            into = np.frombuffer(out, np.uint8).reshape(-1, row_bytes)
            for start, row in zip(at, rows, strict=True):
                into[row] = self.bytes[start : start + row_bytes]
            return
        fd, preadv = self._fd, os.preadv
        with self._reading():
            for start, row in zip(at, rows, strict=True):
                if preadv(fd, (out[row * row_bytes : (row + 1) * row_bytes],), start) != row_bytes:
                    raise StorageError(f"{self.path} ends before byte {start + row_bytes}", rule="a segment is never cut")

    def touch(self, at: np.ndarray) -> int:
        """Notes offsets that were read through the map; returns how many more bytes of it are resident now."""
        if self._map is None:
            return 0
        places = at >> _FAULT_BITS
        new = np.unique(places[~self._faulted[places]])
        self._faulted[new] = True
        return len(new) << _FAULT_BITS

    def read(self, start: int, end: int) -> bytes:
        """A copy of some bytes.

        Raises:
            StorageError: The disk cannot be read.
        """
        if self._fd < 0:
            return self.bytes[start:end].tobytes()
        with self._reading():
            return os.pread(self._fd, max(end - start, 0), start)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"reading {self.path} failed: {error}", rule="the segments can be read", remedy="look at this disk's errors"
            ) from error

    def forget(self) -> None:
        """Hands back the pages of the map."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._faulted[:] = False


def allow_many_files() -> None:
    """Lets this process open as many files as it may: a segment in use holds two, and 1024, the usual limit, are soon spent.

    Code that waits with ``select`` must not be used beside it; nothing on the learner's side does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS names a hard limit that it does not take
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Residency:
    """Bounds what the maps make resident. For several threads at once.

    Args:
        budget: Bytes.

    Attributes:
        fits: Whether all that was mapped so far may stay resident.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._lock, self._touched = budget, threading.Lock(), 0
        self.fits = True

    def update(self, num_bytes: int, arenas: Iterable[Arena]) -> None:
        """There are so many bytes in all arenas now."""
        fitted, self.fits = self.fits, num_bytes <= self._budget
        if fitted and not self.fits:
            for arena in arenas:
                arena.forget()

    def touched(self, num_bytes: int, arenas: Iterable[Arena]) -> None:
        """So many more bytes were read through the maps of these arenas."""
        if self.fits:
            return
        with self._lock:
            self._touched += num_bytes
            if self._touched < min(self._budget, _SMALL_ROWS):
                return
            self._touched = 0
        for arena in arenas:
            arena.forget()


def copy_rows(
    arenas: tuple[Arena, ...], arena_N: np.ndarray, at_N: np.ndarray, out: np.ndarray, fits: bool, first: int, end: int
) -> None:
    """Copies large rows ``first`` to ``end`` from byte offsets in their arenas into ``out`` (N, size), C contiguous.

    Args:
        fits: Through the maps.

    Raises:
        StorageError: The disk cannot be read.
    """
    view, row_bytes = out.reshape(-1).view(np.uint8).data, out.shape[1] * out.itemsize
    for arena, members in _by_arena(arena_N[first:end]):
        rows = members + first
        arenas[arena].read_rows(at_N[rows].tolist(), view, rows.tolist(), row_bytes, fits)


def take(arenas: tuple[Arena, ...], arena_N: np.ndarray, at_N: np.ndarray, out: np.ndarray) -> int:
    """Reads small rows from byte offsets in their arenas into ``out`` (N, size), C contiguous, through the maps.

    Returns:
        How many more bytes are resident.
    """
    num_rows, size = out.shape
    items, within, resident = at_N // out.itemsize, np.arange(size), 0
    for arena, members in _by_arena(arena_N):
        data = arenas[arena].bytes
        values = data[: len(data) - len(data) % out.itemsize].view(out.dtype)
        if len(members) == num_rows:
            np.take(values, items[:, None] + within, out=out, mode="clip")
        else:
            out[members] = values[items[members, None] + within]
        resident += arenas[arena].touch(at_N[members])
    return resident


def _by_arena(arena_N: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(arena, places of its rows), in the order of the arenas."""
    if not len(arena_N):
        return []
    order = np.argsort(arena_N, kind="stable")
    ordered = arena_N[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if not len(edges):
        return [(int(ordered[0]), np.arange(len(arena_N)))]
    return [(int(arena_N[members[0]]), members) for members in np.split(order, edges)]
