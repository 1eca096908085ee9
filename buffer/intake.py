"""An index part fragment by fragment, as plain numbers: what the index goes through one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from buffer.parts import IndexPart


class Runs:
    """Runs of steps of a fragment that one policy call proposed and one source acted in, as plain numbers."""

    def __init__(self, steps: Mapping[str, np.ndarray], num_steps: np.ndarray) -> None:
        chunk_id, source, ends = steps["chunk_id"], steps["source"], np.cumsum(num_steps)
        starts = np.zeros(len(chunk_id), bool)
        starts[(ends - num_steps)[num_steps > 0]] = True
        starts[1:] |= (chunk_id[1:] != chunk_id[:-1]) | (source[1:] != source[:-1])
        first = np.flatnonzero(starts)
        self._first = [*first.tolist(), len(chunk_id)]
        self._chunk_id, self._source = chunk_id[first].tolist(), source[first].tolist()
        self._begin = np.searchsorted(first, ends - num_steps).tolist()
        self._end = np.searchsorted(first, ends).tolist()

    def of_fragment(self, fragment: int) -> Iterator[tuple[int, int, int, int]]:
        """(first step, end, chunk_id, source)."""
        for n in range(self._begin[fragment], self._end[fragment]):
            if self._chunk_id[n] >= 0:
                yield self._first[n], self._first[n + 1], self._chunk_id[n], self._source[n]


class Chunks:
    """Policy calls of each fragment, as plain numbers."""

    def __init__(self, part: IndexPart) -> None:
        columns = (part.chunks[name].tolist() for name in ("row", "chunk_id", "version"))
        self._rows = list(zip(*columns, strict=True))
        self._begin = np.searchsorted(part.chunks["fragment"], np.arange(part.num_fragments + 1)).tolist()

    def of_fragment(self, fragment: int) -> list[tuple[int, int, int]]:
        """(row, chunk_id, version)."""
        return self._rows[self._begin[fragment] : self._begin[fragment + 1]]


def rows_by_fragment(part: IndexPart) -> dict[int, list[tuple[str, dict[str, Any]]]]:
    """Rows of the episodes and labels tables, with the names of these, by index of the fragment."""
    found: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for name, table in (("episodes", part.episodes), ("labels", part.labels)):
        for row in table.to_pylist():
            found.setdefault(row["fragment"], []).append((name, row))
    return found
