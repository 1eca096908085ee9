"""File work beside the updates: one thread, one waiting job of each kind, facts and errors handed back to the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fleet.errors import DiskFull

Fact = tuple[str, dict[str, Any]]  # kind and fields of a journal line
Job = Callable[[], Fact | None]


class Background:
    """Runs jobs one after the other. A job that has not begun is replaced by a newer one of its kind, and counted.

    So the disk is never more than one job of each kind behind, and a slow disk costs freshness instead of updates.
    """

    def __init__(self) -> None:
        self.num_replaced = 0
        self._jobs: dict[str, Job] = {}
        self._facts: list[Fact] = []
        self._error: BaseException | None = None
        self._full: dict[str, DiskFull] = {}  # kinds whose newest job found no room
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="learner-files", daemon=True)
        self._thread.start()

    def submit(self, kind: str, job: Job) -> None:
        """Hands over a job; returns at once."""
        with self._changed:
            self.num_replaced += kind in self._jobs
            self._jobs[kind] = job
            self._changed.notify_all()

    def facts(self) -> list[Fact]:
        """What was done since the last call. A full disk is a fact (``waiting``): the next job tries again.

        Raises:
            BaseException: What a job raised, once.
        """
        with self._changed:
            facts, self._facts = self._facts, []
            error, self._error = self._error, None
        if error is not None:
            raise error
        return facts

    def flush(self) -> list[Fact]:
        """Waits until nothing is left to do; then as ``facts``."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._busy)
        return self.facts()

    def require_done(self) -> None:
        """After ``flush``. Raises DiskFull when the newest job of a kind found no room."""
        for error in self._full.values():
            raise error

    def close(self) -> None:
        """Ends the thread after the job that it is at; what waits is not done."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                kind = next(iter(self._jobs))
                job = self._jobs.pop(kind)
                self._busy = True
            fact, error = None, None
            try:
                fact = job()
                self._full.pop(kind, None)
            except DiskFull as full:
                self._full[kind] = full
                fact = ("waiting", {"why": f"{kind} waits for room: {full}"})
            except BaseException as raised:  # handed to the loop, which raises it
                error = raised
            del job  # what it holds may be used again
            with self._changed:
                self._busy = False
                self._error = self._error or error
                if fact is not None:
                    self._facts.append(fact)
                self._changed.notify_all()
