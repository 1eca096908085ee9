"""Decoded images of encoded columns, in memory that is bounded and taken in whole pages.

A row is found by (column, key); the sampler's keys are its step numbers. Rows are read without the lock and checked
afterwards: a slot that was written meanwhile has another stamp, and its row counts as missing. Which row leaves is
decided by a clock: the hand takes the first row that was not read since it last passed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

PAGE_BYTES = 8 << 20

DecodeMissing = Callable[[int, np.ndarray], bool]  # place in keys, row to fill -> whether it may be kept


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Rows since the start, and bytes of the pages now."""

    hits: int
    misses: int
    evictions: int
    bytes: int

    @property
    def hit_rate(self) -> float:
        """In [0, 1]; 0 before anything was read."""
        return self.hits / max(self.hits + self.misses, 1)


class _Page:
    """Rows of one column: pixels, and for each slot its key (-1: empty), stamp and mark of the clock."""

    def __init__(self, memory: np.ndarray, row_bytes: int) -> None:
        self.memory, num_rows = memory, len(memory) // row_bytes
        self.rows = memory[: num_rows * row_bytes].reshape(num_rows, row_bytes)
        self.key = np.full(num_rows, -1, np.int64)
        self.stamp = [0] * num_rows
        self.read = bytearray(num_rows)


class _Column:
    """Pages of one column. ``where``: key -> (page, slot)."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.pages: list[_Page] = []
        self.where: dict[int, tuple[_Page, int]] = {}
        self.free: list[tuple[_Page, int]] = []
        self.hand = 0

    def add(self, page: _Page) -> None:
        self.pages.append(page)
        self.free += [(page, slot) for slot in range(len(page.rows) - 1, -1, -1)]

    def drop(self) -> tuple[_Page, int]:
        """Gives up the oldest page, and says how many rows it held. Who reads from it now reads on: nothing overwrites it."""
        page, self.hand = self.pages.pop(0), 0
        held = page.key[page.key >= 0].tolist()
        for key in held:
            del self.where[key]
        self.free = [place for place in self.free if place[0] is not page]
        page.key[:] = -1
        return page, len(held)


class ImageCache:
    """For several threads at once.

    Args:
        max_bytes: Of all pages together; 0 keeps nothing. Columns share it evenly when it is short.
        page_bytes: Memory is taken in pages of this size; a column whose rows are larger has a page a row.
    """

    def __init__(self, max_bytes: int, page_bytes: int = PAGE_BYTES) -> None:
        self._max_bytes, self._page_bytes = max_bytes, max(min(page_bytes, max_bytes), 1)
        self._columns: dict[str, _Column] = {}
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def rows(self, column: str, keys: np.ndarray, out: np.ndarray, decode_missing: DecodeMissing) -> None:
        """Fills ``out`` with the images of ``keys``, and keeps those that had to be decoded.

        Args:
            column: Name of the feature. All its rows have one shape.
            keys: (N,) integers >= 0; the same key is always the same image.
            out: (N, ...) uint8, C contiguous, the caller's.
            decode_missing: Called with the place i in ``keys`` and the row ``out[i]``, without the lock. Says whether the
                row may be kept, and is then called once for each different key. What it raises goes through; then nothing
                of this call is kept.
        """
        if not out.flags.c_contiguous:
            raise ValueError(f"out has strides {out.strides}; its rows are filled in place, so it must be C contiguous")
        places = self._read(column, keys, out) if len(keys) else []
        if not places:
            return
        decoded: dict[int, int] = {}
        for i in places:
            key = int(keys[i])
            if key in decoded:
                out[i] = out[decoded[key]]
            elif decode_missing(i, out[i]):
                decoded[key] = i
        self._keep(column, decoded, out.reshape(len(out), -1))

    def cached(self, keys: np.ndarray, columns: tuple[str, ...] | None = None) -> np.ndarray:
        """Which of ``keys`` (N,) have their image of every one of ``columns`` (None: of all) in memory now: (N,) bool."""
        with self._lock:
            names = tuple(self._columns) if columns is None else columns
            held = [self._columns[name].pages if name in self._columns else [] for name in names]
            inside = [np.concatenate([page.key for page in pages]) if pages else np.empty(0, np.int64) for pages in held]
        mask = np.full(len(keys), bool(names))
        for have in inside:
            mask &= np.isin(keys, have)
        return mask

    def stats(self) -> CacheStats:
        """Counts so far."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, self._bytes)

    def _read(self, column: str, keys: np.ndarray, out: np.ndarray) -> list[int]:
        """Copies what is there; returns the places that are not."""
        flat = out.reshape(len(out), -1)
        with self._lock:
            where = self._columns[column].where if column in self._columns else {}
            found = [where.get(key) for key in keys.tolist()]
            stamps = [place[0].stamp[place[1]] if place else 0 for place in found]
        for i, place in enumerate(found):
            if place:
                flat[i] = place[0].rows[place[1]]
        with self._lock:
            missing = []
            for i, place in enumerate(found):
                if place and place[0].stamp[place[1]] == stamps[i]:
                    place[0].read[place[1]] = 1
                else:
                    missing.append(i)
            self._hits += len(found) - len(missing)
            self._misses += len(missing)
        return missing

    def _keep(self, name: str, decoded: dict[int, int], flat: np.ndarray) -> None:
        with self._lock:
            column = self._columns.setdefault(name, _Column(flat.shape[1]))
            for key, i in decoded.items():
                if key in column.where:
                    continue
                place = self._place(column)
                if place is None:
                    return
                page, slot = place
                page.stamp[slot] += 1
                page.rows[slot] = flat[i]
                page.key[slot], page.read[slot] = key, 0
                column.where[key] = place

    def _place(self, column: _Column) -> tuple[_Page, int] | None:
        """An empty slot, after taking memory or making another row leave; None when there is no memory for one row."""
        if not column.free:
            self._grow(column)
        if column.free:
            return column.free.pop()
        return self._evict(column) if column.pages else None

    def _grow(self, column: _Column) -> None:
        """A new page while there is memory; else one of the largest column, as long as this one has less than its share."""
        size = max(self._page_bytes, column.row_bytes)
        if self._bytes + size <= self._max_bytes:
            self._bytes += size
            column.add(_Page(np.empty(size, np.uint8), column.row_bytes))
            return
        largest = max(self._columns.values(), key=_size)
        if largest is column or _size(column) + size > self._max_bytes / len(self._columns):
            return
        freed = 0
        while freed < size and largest.pages and self._bytes - freed + size > self._max_bytes:
            page, num_rows = largest.drop()
            freed += len(page.memory)
            self._evictions += num_rows
        self._bytes -= freed
        if self._bytes + size <= self._max_bytes:
            self._bytes += size
            column.add(_Page(np.empty(size, np.uint8), column.row_bytes))

    def _evict(self, column: _Column) -> tuple[_Page, int]:
        per_page = len(column.pages[0].rows)
        while True:
            column.hand = (column.hand + 1) % (len(column.pages) * per_page)
            page, slot = column.pages[column.hand // per_page], column.hand % per_page
            if not page.read[slot]:
                break
            page.read[slot] = 0
        del column.where[int(page.key[slot])]
        self._evictions += 1
        return page, slot


def _size(column: _Column) -> int:
    return sum(len(page.memory) for page in column.pages)
