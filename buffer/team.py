"""Threads that share the rows of one batch: numpy's copies and the image decoders let go of the interpreter meanwhile."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable, Sequence

LEAST_ROWS = 32  # fewer are not worth waking a thread

Task = tuple[int, Callable[[int, int], None]]
"""(number of rows, what does the rows from one number to another)."""


class Team:
    """A few threads. Several callers may use one team at the same time.

    Args:
        num_threads: The caller's thread counts; 1 starts none.
    """

    def __init__(self, num_threads: int) -> None:
        self._others = max(num_threads, 1) - 1
        self._pool = concurrent.futures.ThreadPoolExecutor(self._others, "rows") if self._others else None

    def share(self, tasks: Sequence[Task]) -> None:
        """Does all rows of all tasks, at the same time, and waits until nobody works any more.

        Raises:
            Exception: What a task raised.
        """
        num_rows = sum(rows for rows, _ in tasks)
        parts = min(self._others + 1, num_rows // LEAST_ROWS)
        if self._pool is None or parts < 2:
            _do(tasks, 0, num_rows)
            return
        edges = [num_rows * i // parts for i in range(parts + 1)]
        others = [self._pool.submit(_do, tasks, first, end) for first, end in itertools.pairwise(edges[1:])]
        try:
            _do(tasks, 0, edges[1])
        finally:
            concurrent.futures.wait(others)  # they write into the caller's arrays
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _do(tasks: Sequence[Task], first: int, end: int) -> None:
    """The rows from ``first`` to ``end`` of all tasks taken as one."""
    before = 0
    for num_rows, work in tasks:
        a, b = max(first - before, 0), min(end - before, num_rows)
        if a < b:
            work(a, b)
        before += num_rows
