"""Where the time of an update goes: seconds by part, and for the first updates a trace for ui.perfetto.dev.

    budget = Budget(device, run.logs / "trace-0.json", trace_steps=200)
    with budget.timed("forward"):
        ...
    budget.step(step)                     # after each update
    progress.seconds = dict(budget.seconds)

A part inside another one is not counted in the other, so the parts of one thread add up to its time. On a GPU the parts
of ``ON_DEVICE`` are the device's own time between two events of its stream, read when the device has passed them:
nothing here waits for it. All other parts are time of the calling thread.
"""

from __future__ import annotations

import collections
import json
import logging
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fleet.errors import StorageError
from fleet.files import Files, storage_errors

log = logging.getLogger("fleet.learner")
PARTS = (
    "sample",  # waits for the batch
    "wait",  # has nothing to do: the rate, or no data
    "poll",
    "exchange",  # with other ranks, beside the gradients
    "prepare",
    "forward",
    "backward",
    "optimizer",
    "after_step",
    "feed_back",
    "publish",  # what the step waits for; the file work is beside it
    "checkpoint",
)
ON_DEVICE = frozenset(("prepare", "forward", "backward", "optimizer", "after_step"))
MAX_SPANS = 400_000  # of a trace: about 50 MB of JSON, which ends there
_LOOP, _BESIDE, _DEVICE = 0, 1, 2  # tracks of a trace
_TRACKS = {_LOOP: "updates", _BESIDE: "files", _DEVICE: "device"}


class Budget:
    """The time of one rank.

    Args:
        device: Of the updates.
        trace: Where the trace goes; None for none.
        trace_steps: Updates that it shows, from now on; 0 for none.
        rank: Its number in the trace, in which times are of the wall clock: files of several ranks can be laid together.

    Attributes:
        seconds: By part, since the beginning.
    """

    def __init__(self, device: torch.device, trace: Path | None = None, trace_steps: int = 0, *, rank: int = 0) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._on_device = device.type == "cuda"
        self._open: _Span | None = None
        self._pending: collections.deque[_DeviceSpan] = collections.deque()  # as long as the device's own queue
        self._events: list[torch.cuda.Event] = []
        self._trace = _Trace(trace, trace_steps, rank) if trace is not None and trace_steps > 0 else None
        self._origin = torch.cuda.Event(enable_timing=True) if self._on_device else None
        if self._origin is not None:
            torch.cuda.synchronize(device)
            self._origin.record()
        self._began = time.perf_counter()

    def timed(self, part: str) -> AbstractContextManager[None]:
        """A context whose time counts for ``part``. Of the thread that makes the updates."""
        return _DeviceSpan(self, part) if self._on_device and part in ON_DEVICE else _Span(self, part)

    def beside(self, job: str) -> AbstractContextManager[None]:
        """A context in another thread: shown in the trace on a track of its own, and not counted in ``seconds``."""
        return _Beside(self, job)

    def step(self, step: int) -> None:
        """Marks that ``step`` updates are done."""
        if self._pending:
            self._read()
        if self._trace is not None and self._trace.mark(step):
            self._finish(self._trace)

    def close(self) -> None:
        """Reads what is left to read, and writes the trace if it has not been."""
        if self._pending:
            self._pending[-1].end.synchronize()
            self._read()
        if self._trace is not None:
            self._finish(self._trace).join()

    def _finish(self, trace: _Trace) -> threading.Thread:
        """Writes the trace beside the updates. A run does not end because its trace finds no room."""
        self._trace = None

        def work() -> None:
            try:
                trace.write()
            except StorageError as error:
                log.warning("%s", error)

        thread = threading.Thread(target=work, name="learner-trace")
        thread.start()
        return thread

    def _read(self) -> None:
        """Takes over what the device has passed."""
        pending, origin = self._pending, self._origin
        while pending and pending[0].end.query():
            span = pending.popleft()
            elapsed_s = span.begin.elapsed_time(span.end) / 1000
            span.add(elapsed_s, _DeviceSpan)
            if self._trace is not None and origin is not None:
                self._trace.add(span.part, _DEVICE, self._began + origin.elapsed_time(span.begin) / 1000, elapsed_s)
            self._events += (span.begin, span.end)

    def event(self) -> torch.cuda.Event:
        """An event of the device that is recorded now."""
        event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Span:
    """One stay in a part."""

    __slots__ = ("_inner_s", "_outer", "_start", "budget", "part")

    def __init__(self, budget: Budget, part: str) -> None:
        self.budget, self.part, self._inner_s = budget, part, 0.0

    def __enter__(self) -> None:
        self._outer, self.budget._open = self.budget._open, self
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        elapsed_s = time.perf_counter() - self._start
        budget = self.budget
        budget._open = self._outer
        self.add(elapsed_s, _Span)
        if budget._trace is not None:
            budget._trace.add(self.part, _LOOP, self._start, elapsed_s)

    def add(self, elapsed_s: float, clock: type[_Span]) -> None:
        """Counts it, and takes it from the part around it where the same clock measures both."""
        seconds = self.budget.seconds
        seconds[self.part] = seconds.get(self.part, 0.0) + elapsed_s - self._inner_s
        if type(self._outer) is clock:
            self._outer._inner_s += elapsed_s


class _DeviceSpan(_Span):
    """One stay in a part, measured by the device. What is inside it ends before it, so it is read before it."""

    __slots__ = ("begin", "end")

    begin: torch.cuda.Event
    end: torch.cuda.Event

    def __enter__(self) -> None:
        super().__enter__()
        self.begin = self.budget.event()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        budget = self.budget
        self.end = budget.event()
        budget._open = self._outer
        budget._pending.append(self)
        if budget._trace is not None:  # what the thread does meanwhile: it hands work to the device
            budget._trace.add(self.part, _LOOP, self._start, time.perf_counter() - self._start)


class _Beside:
    __slots__ = ("_budget", "_job", "_start")

    def __init__(self, budget: Budget, job: str) -> None:
        self._budget, self._job = budget, job

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        trace = self._budget._trace
        if trace is not None:
            trace.add(self._job, _BESIDE, self._start, time.perf_counter() - self._start)


class _Trace:
    """Spans and marks in memory until they are written: no I/O while updates are timed."""

    def __init__(self, path: Path, num_steps: int, rank: int) -> None:
        self.path, self._left, self._rank = path, num_steps, rank
        self._wall_s = time.time() - time.perf_counter()  # from perf_counter to the wall clock
        self._spans: list[tuple[str, int, float, float]] = []
        self._marks: list[tuple[int, float]] = []

    def add(self, name: str, track: int, start: float, elapsed_s: float) -> None:
        if len(self._spans) < MAX_SPANS:
            self._spans.append((name, track, start, elapsed_s))

    def mark(self, step: int) -> bool:
        """Whether the trace is complete now."""
        self._marks.append((step, time.perf_counter()))
        return len(self._marks) >= self._left or len(self._spans) >= MAX_SPANS

    def write(self) -> None:
        """Chrome's trace format: times in microseconds, a process is a rank, a thread is a track.

        Raises:
            StorageError: The disk failed or is full.
        """
        pid = self._rank
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"learner rank {pid}"}},
            *(
                {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
                for tid, name in _TRACKS.items()
            ),
        ]
        for name, tid, start, elapsed_s in list(self._spans):
            place = {"pid": pid, "tid": tid, "ts": self._microseconds(start)}
            events.append({"ph": "X", "name": name, **place, "dur": round(elapsed_s * 1e6, 1)})
        for step, at in self._marks:
            events.append({"ph": "i", "name": f"step {step}", "pid": pid, "tid": _LOOP, "ts": self._microseconds(at), "s": "p"})
        with storage_errors(f"trace {self.path.name}"):
            Files().write_atomic(self.path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())

    def _microseconds(self, perf_s: float) -> float:
        return round((perf_s + self._wall_s) * 1e6, 1)
