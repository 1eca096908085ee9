"""What a sampler knows of a log: follows the committed fragments, the labels, and what retention takes away.

Checksums of payloads are verified where a segment itself is read, and when its sidecar is made; what a sidecar knows is
not read again at a start.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buffer import sidecar
from buffer.arena import Arena, Residency, allow_many_files
from buffer.feedback import Feedback, Span
from buffer.index import StepIndex
from buffer.ingest import latencies_ms
from buffer.labels import AFTERWARDS, LabelReader
from buffer.log import load_spec
from buffer.parts import IndexPart, PartBuilder
from buffer.reader import LogReader, LogRecord, SegmentMap
from buffer.renumber import renumber
from buffer.windows import WindowMaker
from fleet.errors import FleetError, SpecError
from fleet.journal import Journal

ROWS_A_STEP, ROWS_MIN = 4, 1 << 16  # the index may hold so many rows for each step that is there, and always so many


class Follower:
    """One reader of a log. For one thread.

    Args:
        folder: The run's buffer folder.
        task_names: Tasks whose steps are asked for.
        journal: Where ``sampleable`` lines go.
        mapped_bytes: Bound of what mapped segments make resident.

    Attributes:
        index: Of all steps that were read.
        maker, feedback: Of the index; they hear of specs, and of steps that go or get new numbers.
        arenas: Bytes in which the index counts. A tuple that is never changed, so a draw may keep it.
        residency: Of the arenas.
        skipped_fragments: Fragments that could not be read, by the error's code.
        skipped_tasks: Steps of tasks that are not asked for, by task.
    """

    def __init__(self, folder: Path, task_names: Sequence[str], journal: Journal | None, mapped_bytes: int) -> None:
        allow_many_files()
        self._folder, self._journal = folder, journal
        self._reader = LogReader(folder, replacements=True)
        self.skipped_fragments: collections.Counter[str] = collections.Counter()
        self.skipped_tasks: collections.Counter[str] = collections.Counter()
        self._labels = LabelReader(folder, self.skipped_fragments)
        self.index = StepIndex(task_names)
        self.maker, self.feedback = WindowMaker(self.index), Feedback(self.index)
        self.residency = Residency(mapped_bytes)
        self.arenas: tuple[Arena, ...] = ()
        self._segments: dict[int, _Taken] = {}
        self._replaced: set[int] = set()
        self._num_damaged = self._num_new = 0
        self._caught_up = False  # once, with all that there was

    @property
    def position(self) -> int:
        """Fragments read, of the log and of its labels."""
        return self._reader.num_records + self._labels.num_records

    @property
    def damaged(self) -> int:
        """Places in the log that could not be read."""
        return len(self._reader.damaged) + self._num_damaged

    def poll(self, limit: int | None = None) -> int:
        """Takes in what was committed since the last call, and the labels.

        Args:
            limit: At most so many fragments; then sidecars are not used.

        Returns:
            The number of new steps of the tasks that are asked for; what retention wrote anew is not new.
        """
        before = self._num_new
        while limit is None and (name := self._reader.next_sealed()) is not None:
            self._drop(self._reader.take_retired())
            segment, length = self._reader.opened(name)
            if segment is None:
                self._reader.pass_over(name, 0)
                continue
            stored = sidecar.load(name, length)
            part = sidecar.make(segment, length) if stored is None else stored
            self._take_part(part, segment, say=self._caught_up)
            self._num_damaged += part.num_damaged
            if stored is None:
                self.residency.touched(length, self.arenas)
            self._reader.pass_over(name, part.num_records)
        records = self._reader.poll(limit)
        self._drop(self._reader.take_retired())
        self._take_records(records, say=True)
        self._take_labels()
        self._caught_up = self._caught_up or limit is None
        return self._num_new - before

    def spans(self) -> list[Span]:
        """Which steps are of which segment."""
        return [(taken.file, *self.index.span(*run)) for taken in self._segments.values() for run in taken.runs]

    def state(self) -> dict[str, Any]:
        """Up to where the log was read, for ``steps_since``."""
        newest = max(self._segments, default=0)
        num_steps = self._segments[newest].num_steps if newest else 0
        return {"segment": newest, "num_steps": num_steps, "files": [taken.file for taken in self._segments.values()]}

    def reads(self, state: Mapping[str, Any]) -> bool:
        """Whether a ``state`` is of this log: they have a segment's file in common, whose name has a salt."""
        return not {taken.file for taken in self._segments.values()}.isdisjoint(state["files"])

    def steps_since(self, state: Mapping[str, Any]) -> int:
        """Steps that came since a ``state``, of the tasks that are asked for; of another log's state all are new."""
        number = state["segment"]
        newest = self._segments.get(number)
        if not self.reads(state) and (newest is not None or number > max(self._segments, default=0)):
            return self._num_steps_of(0)
        more = newest.num_steps - state["num_steps"] if newest is not None else 0
        return self._num_steps_of(number + 1) + max(more, 0)

    def close(self) -> None:
        self._reader.close()
        self._labels.close()

    def _num_steps_of(self, first_segment: int) -> int:
        return sum(taken.num_steps for number, taken in self._segments.items() if number >= first_segment)

    def _take_records(self, records: Sequence[LogRecord], *, say: bool) -> None:
        for _, of_segment in itertools.groupby(records, key=lambda record: record.segment.number):
            run = list(of_segment)
            segment = run[0].segment
            builder = PartBuilder(segment.address, len(segment.bytes))
            for record in run:
                builder.add(record)
            self._take_part(builder.build(), segment, say=say)
            self.residency.touched(sum(record.payload_length for record in run), self.arenas)

    def _take_part(self, part: IndexPart, segment: SegmentMap, *, say: bool) -> None:
        for code, count in part.refused.items():
            self.skipped_fragments[code] += count
        if not part.num_fragments:
            return
        first = self.index.num_fragments
        taken = self._segments.get(segment.number)
        if taken is None:
            self.arenas = (*self.arenas, Arena(segment.bytes, segment.name.path, segment.data))
            taken = self._segments[segment.number] = _Taken(segment.name.path.name, len(self.arenas) - 1)
        before = self.index.num_drawable
        usable = self._usable(part)
        self.index.take_in(part, taken.arena, usable)
        taken.add(first, self.index.num_fragments)
        taken.num_bytes = int((part.fragments["steps_at"] + part.fragments["steps_length"]).max(initial=taken.num_bytes))
        self.residency.update(sum(taken.num_bytes for taken in self._segments.values()), self.arenas)
        taken.num_steps += self.index.num_drawable - before
        if segment.number in self._replaced:  # read before: neither new steps nor new latencies
            return
        self._num_new += self.index.num_drawable - before
        self._count_others(part, usable)
        if say and self._journal is not None:
            self._say(self._journal, part, first)

    def _count_others(self, part: IndexPart, usable: np.ndarray) -> None:
        """Steps of tasks that are not asked for."""
        for i, task in enumerate(part.tasks):
            if self.index.task_number(task) < 0:
                count = int(part.fragments["num_steps"][usable & (part.fragments["task"] == i)].sum())
                self.skipped_tasks.update({task: count} if count else {})

    def _usable(self, part: IndexPart) -> np.ndarray:
        """By fragment, whether its spec is there."""
        known = np.ones(len(part.specs), bool)
        for i, spec_hash in enumerate(part.specs):
            if spec_hash not in self.maker.specs:
                with contextlib.suppress(FleetError):
                    spec = load_spec(self._folder, spec_hash)
                    if spec is not None:
                        self.maker.add_spec(spec_hash, spec)
                known[i] = spec_hash in self.maker.specs
        usable: np.ndarray = known[part.fragments["spec"]]
        if not usable.all():  # a spec is stored before its data: only a damaged file brings us here
            code = SpecError.code
            self.skipped_fragments[code] += int((~usable).sum())
        return usable

    def _say(self, journal: Journal, part: IndexPart, first: int) -> None:
        now_ns = time.time_ns()
        ends = np.cumsum(part.fragments["num_steps"]).tolist()
        for i, (end, count) in enumerate(zip(ends, part.fragments["num_steps"].tolist(), strict=True)):
            if count and self.index.task[first + i] >= 0 and self.index.num_steps[first + i]:
                robot, boot = part.boots[part.fragments["boot"][i]]
                latency = latencies_ms(part.steps["time_ns"][end - count : end], now_ns)
                journal.write("sampleable", robot=robot, boot=boot, seq=int(part.fragments["seq"][i]), latency_ms=latency)

    def _take_labels(self) -> None:
        for label in self._labels.poll():
            self.index.episodes.add_label(label, AFTERWARDS)

    def _drop(self, numbers: Sequence[int]) -> None:
        """Takes out the steps of segments that retention took away; what it kept of them is read anew."""
        for number in numbers:
            self._replaced.add(number)
            taken = self._segments.pop(number, None)
            if taken is not None:
                for first, end in taken.runs:
                    first_step, num_steps = self.index.span(first, end)
                    self.feedback.drop(np.arange(first_step, first_step + num_steps))
                    self.index.drop(first, end)
                arenas = list(self.arenas)
                arenas[taken.arena] = Arena(np.empty(0, np.uint8))  # the file is let go of when no draw needs it any more
                self.arenas = tuple(arenas)
        if self.index.gaps and self.index.num_rows > max(ROWS_A_STEP * self.index.num_there, ROWS_MIN):
            self.feedback.grow()
            moved = renumber(self.index)
            self.feedback.move(moved.steps)
            for taken in self._segments.values():
                taken.runs = [(moved.fragment(first), moved.fragment(end - 1) + 1) for first, end in taken.runs]
        self.feedback.release()


@dataclasses.dataclass
class _Taken:
    """A segment that was read: its file, arena and runs of fragments. While one is being written, what retention left of
    others is read in between, so its fragments need not be one run."""

    file: str
    arena: int
    num_bytes: int = 0
    num_steps: int = 0  # of the tasks that are asked for
    runs: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def add(self, first: int, end: int) -> None:
        if self.runs and self.runs[-1][1] == first:
            first, _ = self.runs.pop()
        self.runs.append((first, end))
