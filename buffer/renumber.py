"""New numbers for steps that retention left, so that the memory of those around them can be let go of.

An index lets go of its oldest rows only, and a protected episode stays for ever: behind one at the head all that came and
went since would be held. The kept fragments before the newest gap are numbered anew, behind all others; their order, links
and places in the pools stay as they are. In proportion to the rows that are held.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from buffer.index import StepIndex


@dataclasses.dataclass(frozen=True)
class Moved:
    """What has new numbers.

    Attributes:
        fragments, steps: Old numbers, rising. The new ones count up from ``first_fragment`` and ``first_step``.
    """

    fragments: np.ndarray
    steps: np.ndarray
    first_fragment: int
    first_step: int

    def fragment(self, old: int) -> int:
        """The new number of a fragment; that of one that was not moved stays."""
        at = int(np.searchsorted(self.fragments, old))
        moved = at < len(self.fragments) and self.fragments[at] == old
        return self.first_fragment + at if moved else old


def renumber(index: StepIndex) -> Moved:
    """Moves what lies before the newest gap; there must be one. Then nothing before it is held any more."""
    first, end = index.num_steps.first, index.gaps[-1][1]
    kept = np.ones(end - first, bool)
    for start, stop in index.gaps:
        kept[start - first : stop - first] = False
    fragments = first + np.flatnonzero(kept)
    counts = index.num_steps[fragments].astype(np.int64)
    ends = np.cumsum(counts)
    steps = np.repeat(index.first_step[fragments] - ends + counts, counts) + np.arange(int(counts.sum()))
    moved = Moved(fragments, steps, index.num_fragments, index.end)
    first_step, num_steps = index.span(first, end)
    new_fragment = _Numbers(first, end, fragments, moved.first_fragment)
    new_step = _Numbers(first_step, first_step + num_steps, steps, moved.first_step)
    new_chunk = _move_chunks(index, end, new_fragment)
    _move_fragments(index, moved, ends - counts)
    _move_steps(index, moved, new_fragment)
    for column in (index.next, index.prev, index.episodes.first_step, *index.pools.values()):
        new_step.replace(column.view)
    new_chunk.replace(index.chunk.view)
    for boot in index.boots.values():
        numbers = np.array(boot.fragments, np.int64)
        new_fragment.replace(numbers)
        boot.fragments = numbers.tolist()
        chunks = np.array([number for number, _ in boot.chunks.values()], np.int64)
        new_chunk.replace(chunks)
        versions = (version for _, version in boot.chunks.values())
        boot.chunks = dict(zip(boot.chunks, zip(chunks.tolist(), versions, strict=True), strict=True))
    index.gaps[:] = [(first, end)]
    index.release()
    return moved


class _Numbers:
    """New numbers of what had those from ``first`` up to ``end``: for ``kept`` they count up from ``start``, else -1."""

    def __init__(self, first: int, end: int, kept: np.ndarray, start: int) -> None:
        self._first, self._new = first, np.full(end - first, -1, np.int64)
        self._new[kept - first] = start + np.arange(len(kept))

    def of(self, old: np.ndarray) -> np.ndarray:
        new: np.ndarray = self._new[old - self._first]
        return new

    def replace(self, numbers: np.ndarray) -> None:
        """In place."""
        old = (numbers >= self._first) & (numbers < self._first + len(self._new))
        numbers[old] = self.of(numbers[old])


def _move_chunks(index: StepIndex, end: int, new_fragment: _Numbers) -> _Numbers:
    """Policy calls of the fragments before ``end``."""
    first = index.chunk_fragment.first
    count = int(np.searchsorted(index.chunk_fragment.view, end))
    fragment = new_fragment.of(index.chunk_fragment.view[:count])
    kept = np.flatnonzero(fragment >= 0)
    numbers = _Numbers(first, first + count, first + kept, index.chunk_fragment.end)
    index.chunk_fragment.extend(fragment[kept], len(kept))
    index.chunk_row.extend(index.chunk_row[first + kept], len(kept))
    return numbers


def _move_fragments(index: StepIndex, moved: Moved, offsets: np.ndarray) -> None:
    fragments, count = moved.fragments, len(moved.fragments)
    index.first_step.extend(moved.first_step + offsets, count)
    for column in (*index.places.values(), *index.offsets.values()):
        column.extend_to(moved.first_fragment)
        column.extend(column[fragments], count)
    columns = (index.num_steps, index.episode, index.first_frame, index.task, index.arena)
    for column in (*columns, index.chunks_at, index.chunks_length):
        column.extend(column[fragments], count)


def _move_steps(index: StepIndex, moved: Moved, new_fragment: _Numbers) -> None:
    steps, count = moved.steps, len(moved.steps)
    index.fragment.extend(new_fragment.of(index.fragment[steps]), count)
    for column in (index.next, index.prev, index.source, index.reward, index.flags, index.version, index.chunk):
        column.extend(column[steps], count)
