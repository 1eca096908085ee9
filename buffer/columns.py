"""Growable numpy columns whose values keep their numbers while the oldest are let go of."""

from __future__ import annotations

from typing import Any

import numpy as np

_SMALLEST = 1024


class Column:
    """Numbered values: they are added at the end and let go of at the beginning; a number never changes its meaning.

    Args:
        dtype: Of the values.
        fill: Value of numbers that were skipped by ``extend_to``.
        first: The number of the first value.
    """

    def __init__(self, dtype: Any, fill: Any = 0, first: int = 0) -> None:
        self._data = np.empty(_SMALLEST, dtype)
        self._fill, self._first, self._count = fill, first, 0

    @property
    def end(self) -> int:
        """The number that the next value gets."""
        return self._first + self._count

    @property
    def first(self) -> int:
        """The number of the oldest value that is kept."""
        return self._first

    @property
    def view(self) -> np.ndarray:
        """All values that are kept, oldest first. Stays as it is when values are added or let go of."""
        return self._data[: self._count]

    def __getitem__(self, numbers: Any) -> Any:
        """Values by number; what was let go of must not be asked for."""
        return self._data[numbers - self._first if self._first else numbers]

    def __setitem__(self, numbers: Any, values: Any) -> None:
        self._data[numbers - self._first] = values

    def extend(self, values: Any, count: int) -> None:
        """Adds ``count`` values: an array of that length, or one value for all."""
        need = self._count + count
        if need > len(self._data):
            grown = np.empty(max(need, len(self._data) * 5 // 4), self._data.dtype)
            grown[: self._count] = self.view
            self._data = grown
        self._data[self._count : need] = values
        self._count = need

    def extend_to(self, end: int) -> None:
        """Fills up to the number ``end``."""
        self.extend(self._fill, max(0, end - self.end))

    def release(self, first: int) -> None:
        """Lets go of all values before the number ``first``, in a new array: views of the old one stay valid."""
        if first > self._first:
            kept = self._data[first - self._first : self._count]
            data = np.empty(max(len(kept), _SMALLEST), self._data.dtype)
            data[: len(kept)] = kept
            self._data, self._first, self._count = data, first, len(kept)

    def keep(self, mask: np.ndarray) -> None:
        """Keeps only some values, which get new numbers from 0 on; in a new array."""
        kept = self.view[mask]
        self._data = np.concatenate([kept, np.empty(_SMALLEST, self._data.dtype)])
        self._first, self._count = 0, len(kept)
