"""Batches ahead of the learner: one thread owns the sampler (it polls and draws), others gather.

The draw of step s + depth is made when step s is asked for, so what was fed back before is in it, and batches come in
the order of their steps. What was drawn ahead is dropped when the needs change, or a release on which their filter depends.
New steps and labels are in what is drawn after they were read: at most ``depth`` + 1 batches later. An error of any thread
is raised where the learner asks for its batch; a thread that is gone is noticed. Nothing here waits for ever.

A learner that begins in the middle draws its first depth + 1 batches at once. Where draws depend on what is fed back these
then know more than they would have known without the stop; without feedback they are the same.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from buffer.gather import Allocate, Draw
from fleet.batch import BatchNeeds, Windows
from fleet.errors import FleetError, LearnerError, NoData
from fleet.robot import Source

POLL_S = 0.1  # between two looks at the log
LOOK_S = 0.5  # between two looks at the threads, while a batch is waited for
T = TypeVar("T")


class Sampling(Protocol):
    """What is prefetched from: ``buffer.sampler.Sampler``. Only ``gather`` is called from several threads."""

    def poll(self) -> int: ...

    def counts(self) -> np.ndarray: ...

    def balance(self, counts_SKT: np.ndarray) -> None: ...

    def draw(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Draw: ...

    def gather(self, draw: Draw, out: Allocate | None = None) -> Windows: ...

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def reads(self, state: Mapping[str, Any]) -> bool: ...

    def load_state(self, state: Mapping[str, Any]) -> int: ...


class Arrays:
    """Arrays of one batch by name, made once and filled again and again."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._arrays: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = self._arrays.get(name)
        if array is None or array.shape != tuple(shape) or array.dtype != dtype:
            array = self._arrays[name] = self._allocate(name, tuple(shape), np.dtype(dtype))
        return array


@dataclasses.dataclass(eq=False)
class _Job:
    """One batch on its way: asked for, drawn, gathered, done."""

    needs: BatchNeeds
    step: int
    newest_version: int
    draw: Draw | None = None
    arrays: Arrays | None = None
    windows: Windows | None = None
    error: BaseException | None = None
    done: bool = False
    dropped: bool = False

    def is_for(self, needs: BatchNeeds, step: int, newest_version: int) -> bool:
        """Whether it is what is asked for now. A newer release makes other steps too old."""
        in_time = needs.filter.max_version_age is None or self.newest_version == newest_version
        return (self.step, self.needs) == (step, needs) and in_time


class Prefetcher:
    """The learner's source of batches. Its methods are for one thread, the learner's.

    Args:
        sampler: Nobody else uses it after the first call here.
        depth: Batches ahead. 0: no threads, each batch is drawn and gathered when it is asked for.
        workers: Threads that gather.
        allocate: Makes the arrays that batches are gathered into, of which depth + 2 sets are used in turn; None: each
            batch has its own.

    Attributes:
        position: Of the log, at which the newest batch that was handed out was drawn.
    """

    def __init__(self, sampler: Sampling, *, depth: int = 2, workers: int = 1, allocate: Allocate | None = None) -> None:
        self._sampler, self._depth, self._num_workers = sampler, depth, workers
        self._free = [Arrays(allocate) for _ in range(depth + 2)] if allocate is not None else None
        self._lent: Arrays | None = None
        self._ahead: collections.deque[_Job] = collections.deque()
        self._to_gather: collections.deque[_Job] = collections.deque()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._counts_KT = np.zeros((len(Source), 0), np.int64)
        self._balance_SKT: np.ndarray | None = None
        self._num_new = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self.position = 0

    @property
    def num_ready(self) -> int:
        """Batches that could be handed out at once."""
        with self._changed:
            return sum(job.done for job in self._ahead)

    def poll(self) -> int:
        """Steps that came since the last call. The first call looks itself, later ones ask the thread that does."""
        if not self._threads:
            new = self._poll()
            self._start()
            return new
        with self._changed:
            self._check()
            new, self._num_new = self._num_new, 0
        return new

    def num_steps(self, source: Source | None = None) -> int:
        """Steps that can be drawn, of one source or of all, at the last look."""
        counts_KT = self.counts()
        return int(counts_KT.sum() if source is None else counts_KT[source].sum())

    def counts(self) -> np.ndarray:
        """Steps that can be drawn by source and task (K, T), at the last look."""
        if not self._threads:
            return self._sampler.counts()
        with self._changed:
            return self._counts_KT

    def balance(self, counts_SKT: np.ndarray) -> None:
        """Tells the sampler what all shards have, before it draws what is asked for next: ``depth`` batches later."""
        if self._balance_SKT is None or not np.array_equal(counts_SKT, self._balance_SKT):
            self._balance_SKT = copied = counts_SKT.copy()
            self.post(lambda: self._sampler.balance(copied))

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        """The batch of a step. With ``allocate``, it may be overwritten from the next call on.

        Raises:
            NoData: As the sampler; the next call looks again.
            FleetError: What the sampler raised for this batch, or what ended a thread, with the original as its cause.
            LearnerError: For any other error, likewise; or a thread is gone.
        """
        if not self._depth:
            draw = self._sampler.draw(needs, step, newest_version)
            self.position = draw.position
            return self._sampler.gather(draw, self._free[0] if self._free else None)
        self._start()
        with self._changed:
            self._give_back()
            if self._ahead and not self._ahead[0].is_for(needs, step, newest_version):
                self._drop()
            was_ahead = bool(self._ahead)
            self._ask(needs, step, newest_version)
            job = self._wait_for(self._ahead[0])
            if was_ahead and isinstance(job.error, NoData):  # then there was none: look again
                self._drop()
                self._ask(needs, step, newest_version)
                job = self._wait_for(self._ahead[0])
            if job.error is not None:
                self._drop()
                raise _reraised(job.error, f"the batch of step {step}") from job.error
            self._ahead.popleft()
            assert job.windows is not None and job.draw is not None
            self._lent, self.position = job.arrays, job.draw.position
            return job.windows

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None:
        """Gives the sampler the losses of a batch, before it draws what is asked for next: ``depth`` batches later.

        What the sampler raises is raised by a later call of this class.
        """
        self.post(lambda: self._sampler.feed_back(windows, loss_B, table))

    def state(self) -> dict[str, Any]:
        """As the sampler, after all that was fed back. What came and was not asked for (``poll``) is not forgotten in it."""
        return self.ask(lambda: {**self._sampler.state(), "untold": self._num_new})

    def reads(self, state: Mapping[str, Any]) -> bool:
        """As the sampler."""
        return self.ask(lambda: self._sampler.reads(state))

    def load_state(self, state: Mapping[str, Any]) -> int:
        """As the sampler, before whatever is asked for later. What came so far is told here, not by the next ``poll``."""

        def load() -> int:
            num_new = self._sampler.load_state(state)
            with self._changed:
                self._num_new = 0
            return num_new

        return self.ask(load) + int(state.get("untold", 0))

    def post(self, call: Callable[[], None]) -> None:
        """Has something done by the thread that owns the sampler, before whatever is asked for later."""
        if not self._threads:
            call()
            return
        with self._changed:
            self._check()
            self._calls.append(call)
            self._changed.notify_all()

    def ask(self, call: Callable[[], T]) -> T:
        """As ``post``, and waits for what it returns.

        Raises:
            FleetError: As ``batch``.
        """
        answers: list[T] = []
        self.post(lambda: answers.append(call()))
        with self._changed:
            while not answers:
                self._check()
                self._changed.wait(LOOK_S)
        return answers[0]

    def close(self) -> None:
        """Ends the threads after what they are at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        if self._threads or not self._depth:
            return
        targets = [("buffer-draw", self._own)] + [(f"buffer-gather-{i}", self._work) for i in range(self._num_workers)]
        self._counts_KT = self._sampler.counts()
        self._threads = [threading.Thread(target=self._guarded, args=(t,), name=name, daemon=True) for name, t in targets]
        for thread in self._threads:
            thread.start()

    def _ask(self, needs: BatchNeeds, step: int, newest_version: int) -> None:
        """Has the batches up to ``step + depth`` drawn, those that are not yet."""
        first = self._ahead[-1].step + 1 if self._ahead else step
        for later in range(first, step + self._depth + 1):
            job = _Job(needs, later, newest_version)
            self._ahead.append(job)
            self._calls.append(lambda job=job: self._draw(job))  # type: ignore[misc]
        self._changed.notify_all()

    def _wait_for(self, job: _Job) -> _Job:
        while not job.done:
            self._check()
            self._changed.wait(LOOK_S)
        return job

    def _check(self) -> None:
        if self._error is not None:
            raise _reraised(self._error, "prefetching") from self._error
        gone = [thread.name for thread in self._threads if not thread.is_alive()]
        if gone:
            raise LearnerError(f"prefetching has ended: {', '.join(gone)} is gone", rule="its threads live until it is closed")

    def _drop(self) -> None:
        """Nothing that is on its way is wanted."""
        for job in self._ahead:
            job.dropped = True
            if job.done:
                self._return(job)
        self._ahead.clear()

    def _give_back(self) -> None:
        if self._lent is not None and self._free is not None:
            self._free.append(self._lent)
            self._lent = None
            self._changed.notify_all()

    def _return(self, job: _Job) -> None:
        if job.arrays is not None and self._free is not None:
            self._free.append(job.arrays)
            job.arrays = None
            self._changed.notify_all()

    def _finish(self, job: _Job, error: BaseException | None = None) -> None:
        with self._changed:
            job.error, job.done = error, True
            if job.dropped or error is not None:
                self._return(job)
            self._changed.notify_all()

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:  # raised again where the learner asks for a batch
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _own(self) -> None:
        """The thread that uses the sampler."""
        polled = time.monotonic()
        while True:
            with self._changed:
                wait_s = polled + POLL_S - time.monotonic()
                self._changed.wait_for(lambda: self._calls or self._closed, max(wait_s, 0.0))
                if self._closed:
                    return
                call = self._calls.popleft() if self._calls else None
            if call is not None:
                call()
            if time.monotonic() >= polled + POLL_S:
                self._poll()
                polled = time.monotonic()
            with self._changed:
                self._changed.notify_all()  # for ``ask``

    def _poll(self) -> int:
        new = self._sampler.poll()
        counts_KT = self._sampler.counts()
        with self._changed:
            self._counts_KT = counts_KT
            self._num_new += new if self._threads else 0
        return new

    def _draw(self, job: _Job) -> None:
        if job.dropped:
            return
        try:
            job.draw = self._sampler.draw(job.needs, job.step, job.newest_version)
        except Exception as error:
            self._finish(job, error)
            return
        with self._changed:
            self._to_gather.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        """A thread that gathers."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._to_gather and self._free != []))
                if self._closed:
                    return
                job = self._to_gather.popleft()
                if job.dropped:
                    continue
                job.arrays = self._free.pop() if self._free is not None else None
            assert job.draw is not None
            try:
                job.windows = self._sampler.gather(job.draw, job.arrays)
            except Exception as error:
                self._finish(job, error)
            else:
                self._finish(job)


def _reraised(error: BaseException, what: str) -> FleetError:
    """What the learner's thread raises for an error of another one."""
    if isinstance(error, FleetError):
        return copy.copy(error)
    return LearnerError(f"{what} failed: {error!r}", rule="the sampler raises typed errors only", remedy="report this error")
