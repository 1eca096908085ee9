"""Where every step of the log lies: growable numpy arrays, so that a batch is a few fancy-indexing calls.

No step is copied into memory. For each fragment and column the index holds the offset of the column's first value in
its arena, a mapped segment; a row is found by arithmetic. A column that is not in the map as it must be used (another
writer's compressed or unaligned Arrow data) gets an arena of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from buffer.reader import SegmentMap
from fleet.record import ALIGNMENT


class Growable:
    """A numpy array that grows at the end. ``view`` is what is there."""

    def __init__(self, dtype: Any) -> None:
        self._data = np.empty(1024, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> np.ndarray:
        return self._data[: self._length]

    def extend(self, values: Any, count: int) -> None:
        """Adds ``count`` values: an array of that length, or one value for all."""
        need = self._length + count
        if need > len(self._data):
            grown = np.empty(max(need, 2 * len(self._data)), self._data.dtype)
            grown[: self._length] = self.view
            self._data = grown
        self._data[self._length : need] = values
        self._length = need


class Arenas:
    """Byte arrays that columns lie in: the mapped segments, and copies where a column cannot be used in place."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._of_segment: dict[int, int] = {}

    def of_segment(self, segment: SegmentMap) -> int:
        """The arena of a mapped segment."""
        if segment.number not in self._of_segment:
            self._of_segment[segment.number] = self._add(segment.bytes)
        return self._of_segment[segment.number]

    def locate(self, column: pa.Array, segment: SegmentMap, itemsize: int) -> tuple[int, int]:
        """(arena, offset in items) of the first value of a fixed-width column, lists of fixed size included."""
        values = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
        data = values.buffers()[1]
        at = data.address + values.offset * itemsize - segment.address
        if at >= 0 and at + len(values) * itemsize <= len(segment.bytes) and at % itemsize == 0:
            return self.of_segment(segment), at // itemsize
        copied = np.frombuffer(data, np.uint8)[values.offset * itemsize :][: len(values) * itemsize]
        return self._add(np.concatenate([copied, np.zeros(-len(copied) % ALIGNMENT, np.uint8)])), 0

    def gather(self, arenas: np.ndarray, starts: np.ndarray, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """Rows of ``size`` items each, from ``starts`` (in items) in their arenas: (len(starts), size)."""
        out = np.empty((len(starts), size), dtype)
        within = np.arange(size)
        first = int(arenas[0])
        if (arenas == first).all():
            np.take(self._arrays[first].view(dtype), starts[:, None] + within, out=out, mode="clip")
            return out
        for arena in np.unique(arenas):
            rows = np.flatnonzero(arenas == arena)
            out[rows] = self._arrays[arena].view(dtype)[starts[rows, None] + within]
        return out

    def _add(self, array: np.ndarray) -> int:
        self._arrays.append(array)
        return len(self._arrays) - 1


class Places:
    """For one fixed-width column: the arena and the offset of its first value, by fragment. -1 where it has none."""

    def __init__(self) -> None:
        self.arena = Growable(np.int32)
        self.offset = Growable(np.int64)

    def fill_to(self, num_fragments: int) -> None:
        """Fragments so far that lack the column."""
        self.arena.extend(-1, num_fragments - len(self.arena))
        self.offset.extend(-1, num_fragments - len(self.offset))

    def add(self, place: tuple[int, int]) -> None:
        self.arena.extend(place[0], 1)
        self.offset.extend(place[1], 1)


class StepIndex:
    """One row a step, in the order of the log.

    Attributes:
        fragment, row: Where the step lies.
        next: The step that follows in the same episode under the same source, -1 where there is none (yet).
        source, task: fleet.robot.Source; index into the task names.
        version: Policy version behind the step, -1 for none.
    """

    def __init__(self) -> None:
        self.fragment = Growable(np.int32)
        self.row = Growable(np.int32)
        self.next = Growable(np.int64)
        self.source = Growable(np.uint8)
        self.task = Growable(np.int16)
        self.version = Growable(np.int64)

    def __len__(self) -> int:
        return len(self.fragment)

    def add(self, fragment: int, source: np.ndarray, task: int, version: np.ndarray) -> int:
        """Adds a run of steps of one episode; returns the index of the first."""
        first, count = len(self), len(source)
        following = np.arange(first + 1, first + count + 1)
        following[-1] = -1
        following[:-1][source[1:] != source[:-1]] = -1
        self.fragment.extend(fragment, count)
        self.row.extend(np.arange(count), count)
        self.next.extend(following, count)
        self.source.extend(source, count)
        self.task.extend(task, count)
        self.version.extend(version, count)
        return first

    def windows(self, starts: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps of the windows that begin at ``starts`` (B,): (B, H) indices and mask; the last step is repeated."""
        steps = np.empty((len(starts), horizon), np.int64)
        mask = np.ones((len(starts), horizon), bool)
        following = self.next.view
        steps[:, 0] = starts
        for h in range(1, horizon):
            after = following[steps[:, h - 1]]
            mask[:, h] = (after >= 0) & mask[:, h - 1]
            steps[:, h] = np.where(mask[:, h], after, steps[:, h - 1])
        return steps, mask
