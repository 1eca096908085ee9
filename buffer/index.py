"""Where every step of the log lies, and what is known of it: numpy columns by step and by fragment.

No observation is copied into memory. For each fragment and feature the index holds the offset of the first value in the
mapped segment; a row is found by arithmetic. Steps, fragments and chunks have numbers that never change their meaning:
new ones are added at the end, and when retention takes segments away, the oldest rows are let go of. What is kept between
others that are gone may be given new numbers (``buffer.renumber``).

Steps of a boot are linked to the one before and the one behind, across fragments in the order of ``seq``. A step is
linked to the next frame of its episode, and an episode's newest step to the first one of a later episode; where frames
are missing there is no link.

Shape suffixes: B batch, W steps of a walk.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from buffer.columns import Column
from buffer.episodes import EpisodeTable
from buffer.intake import Chunks, Runs, rows_by_fragment
from buffer.labels import BY_ROBOT, label_of
from buffer.parts import ABSENT, TERMINATED, IndexPart
from fleet.batch import Within
from fleet.robot import Source

_CHUNKS_KEPT = 4096  # policy calls of a boot to which later steps may refer


@dataclasses.dataclass
class _Boot:
    """Fragments of a (robot, boot) that have steps, in the order of seq, and its newest policy calls."""

    seqs: list[int] = dataclasses.field(default_factory=list)
    fragments: list[int] = dataclasses.field(default_factory=list)
    chunks: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)  # chunk_id -> number, version


@dataclasses.dataclass(frozen=True)
class Walk:
    """Steps around t. steps_BW: numbers; the column ``back`` is t. inside_BW: False beyond t's border."""

    steps_BW: np.ndarray
    inside_BW: np.ndarray
    back: int


class StepIndex:
    """All steps that were read.

    Args:
        task_names: Tasks that are asked for; steps of others have task -1.

    Attributes:
        episodes: What became of them.
        fragment, next, prev, source, reward, flags, version, chunk: Columns by step. next, prev: -1 where there is none.
            version: Policy version behind the step, -1 for none. chunk: number of its policy call, -1 for none.
        first_step, num_steps, episode, first_frame, task, arena, chunks_at, chunks_length: Columns by fragment; the last
            three count in the arena of the segment.
        places, offsets: Columns by fragment for each feature.
        chunk_fragment, chunk_row: Columns by policy call.
        pools: (source, task) -> numbers of steps of tasks that are asked for.
        boots: By (robot, boot).
        gaps: Fragments that were taken out and are not let go of, as (first, end), rising, never side by side.
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        self.task_names = tuple(task_names)
        self._task_numbers = {name: i for i, name in enumerate(self.task_names)}
        self.episodes = EpisodeTable()
        self.fragment, self.next, self.prev = Column(np.int32), Column(np.int64), Column(np.int64)
        self.source, self.reward, self.flags = Column(np.uint8), Column(np.float32), Column(np.uint8)
        self.version, self.chunk = Column(np.int64), Column(np.int64)
        self.first_step, self.num_steps = Column(np.int64), Column(np.int32)
        self.episode, self.first_frame = Column(np.int32), Column(np.int32)
        self.task, self.arena = Column(np.int32), Column(np.int32)
        self.chunks_at, self.chunks_length = Column(np.int64), Column(np.int64)
        self.places: dict[str, Column] = {}
        self.offsets: dict[str, Column] = {}
        self.chunk_fragment, self.chunk_row = Column(np.int32), Column(np.int32)
        self.pools: dict[tuple[int, int], Column] = {}
        self.newest_version = -1
        self.boots: dict[tuple[str, str], _Boot] = {}
        self.gaps: list[tuple[int, int]] = []

    @property
    def num_fragments(self) -> int:
        """Fragments read so far, retired ones included: the number that the next one gets."""
        return self.num_steps.end

    @property
    def end(self) -> int:
        """Steps read so far, retired ones included: the number that the next one gets."""
        return self.fragment.end

    @property
    def num_rows(self) -> int:
        """Steps that are held in memory."""
        return self.end - self.fragment.first

    @property
    def num_there(self) -> int:
        """Steps that were not taken out."""
        return self.num_rows - sum(self.span(*gap)[1] for gap in self.gaps)

    @property
    def num_drawable(self) -> int:
        """Steps of the tasks that are asked for."""
        return sum(len(pool.view) for pool in self.pools.values())

    def task_number(self, name: str) -> int:
        """Index of a task among those that are asked for, else -1."""
        return self._task_numbers.get(name, -1)

    def take_in(self, part: IndexPart, arena: int, usable: np.ndarray) -> None:
        """Adds all fragments of a part.

        Args:
            part: Of the segment that ``arena`` names.
            usable: By fragment, False for one whose steps are to be left out.
        """
        first_fragment, first_step = self.num_fragments, self.end
        tasks = np.array([*(self.task_number(name) for name in part.tasks), -1], np.int32)[part.fragments["task"]]
        num_steps = np.where(usable, part.fragments["num_steps"], 0)
        self._add_fragments(part, arena, tasks, num_steps, first_step)
        of_step = np.repeat(np.arange(part.num_fragments), part.fragments["num_steps"])
        kept = usable[of_step]
        everything = bool(kept.all())
        steps = part.steps if everything else {name: values[kept] for name, values in part.steps.items()}
        of_step = of_step if everything else of_step[kept]
        self._add_steps(steps, of_step, num_steps, first_fragment)
        self._add_pools(steps["source"], tasks[of_step], first_step)
        self._join(part, steps, tasks, num_steps, first_fragment, first_step)

    def _add_fragments(self, part: IndexPart, arena: int, tasks: np.ndarray, num_steps: np.ndarray, first_step: int) -> None:
        count, before = part.num_fragments, self.num_fragments
        self.first_step.extend(first_step + np.cumsum(num_steps) - num_steps, count)
        self.num_steps.extend(num_steps, count)
        self.first_frame.extend(part.fragments["first_frame"], count)
        self.episode.extend(-1, count)
        self.task.extend(tasks, count)
        self.arena.extend(arena, count)
        self.chunks_at.extend(part.fragments["chunks_at"], count)
        self.chunks_length.extend(part.fragments["chunks_length"], count)
        for columns, values in ((self.places, part.places), (self.offsets, part.offsets)):
            for name, at in values.items():
                column = columns.setdefault(name, Column(np.int64, ABSENT))
                column.extend_to(before)
                column.extend(at, count)

    def _add_steps(
        self, steps: Mapping[str, np.ndarray], of_step: np.ndarray, num_steps: np.ndarray, first_fragment: int
    ) -> None:
        """Links within the fragments; those across them follow."""
        count, first = len(of_step), self.end
        numbers = np.arange(first, first + count)
        following, before = numbers + 1, numbers - 1
        ends = np.cumsum(num_steps)[num_steps > 0]
        following[ends - 1] = -1
        before[ends - num_steps[num_steps > 0]] = -1
        self.fragment.extend(first_fragment + of_step, count)
        self.next.extend(following, count)
        self.prev.extend(before, count)
        for name in ("source", "reward", "flags"):
            getattr(self, name).extend(steps[name], count)

    def _add_pools(self, source: np.ndarray, task: np.ndarray, first: int) -> None:
        keys = source.astype(np.int64) * (len(self.task_names) + 1) + task + 1
        for key in np.unique(keys).tolist():
            number = key % (len(self.task_names) + 1) - 1
            if number >= 0:
                members = np.flatnonzero(keys == key) + first
                pool = self.pools.setdefault((key // (len(self.task_names) + 1), number), Column(np.int64))
                pool.extend(members, len(members))

    def _join(
        self,
        part: IndexPart,
        steps: Mapping[str, np.ndarray],
        tasks: np.ndarray,
        num_steps: np.ndarray,
        first_fragment: int,
        first_step: int,
    ) -> None:
        """Fragment by fragment: episodes, links to the boot's other fragments, versions of its steps."""
        rows, chunks, runs = rows_by_fragment(part), Chunks(part), Runs(steps, num_steps)
        version, chunk = np.full(len(steps["source"]), -1), np.full(len(steps["source"]), -1)
        operator = np.cumsum([0, *(steps["source"] == Source.OPERATOR)]).tolist()
        columns = (part.fragments[name].tolist() for name in ("boot", "seq", "episode_id", "first_frame"))
        at = 0
        for i, (boot_index, seq, episode_id, first_frame) in enumerate(zip(*columns, strict=True)):
            key, count, fragment = part.boots[boot_index], int(num_steps[i]), first_fragment + i
            boot = self.boots.setdefault(key, _Boot())
            for table, row in rows.get(i, ()):
                if table == "labels":
                    self.episodes.add_label(label_of(row), BY_ROBOT)
                else:
                    self.episodes.add_row(key, row, self.task_number(row["task"]))
            self._add_chunks(boot, fragment, chunks.of_fragment(i))
            if not count:
                continue
            episode = self.episodes.number((*key, episode_id))
            self.episode[fragment] = episode
            num_operator, last_frame = operator[at + count] - operator[at], first_frame + count - 1
            ended = bool(steps["flags"][at + count - 1] & TERMINATED)
            self.episodes.add_steps(episode, int(tasks[i]), first_step + at, count, last_frame, num_operator, ended)
            for start, end, chunk_id, source in runs.of_fragment(i):
                known = boot.chunks.get(chunk_id)
                if known is not None:
                    chunk[start:end], version[start:end] = known
                    self.newest_version = max(self.newest_version, known[1])
                    if source == Source.POLICY:
                        self.episodes.add_version(episode, known[1])
            self._insert(boot, seq, fragment)
            at += count
        self.version.extend(version, len(version))
        self.chunk.extend(chunk, len(chunk))

    def _add_chunks(self, boot: _Boot, fragment: int, chunks: list[tuple[int, int, int]]) -> None:
        for row, chunk_id, version in chunks:
            boot.chunks[chunk_id] = (self.chunk_row.end, version)
            self.chunk_fragment.extend(fragment, 1)
            self.chunk_row.extend(row, 1)
        while len(boot.chunks) > _CHUNKS_KEPT:
            del boot.chunks[next(iter(boot.chunks))]

    def _insert(self, boot: _Boot, seq: int, fragment: int) -> None:
        """Links a fragment to its neighbours in its boot."""
        at = len(boot.seqs) if not boot.seqs or seq > boot.seqs[-1] else bisect.bisect(boot.seqs, seq)
        boot.seqs.insert(at, seq)
        boot.fragments.insert(at, fragment)
        if at > 0:
            self._link(boot.fragments[at - 1], fragment)
        if at + 1 < len(boot.fragments):
            self._link(fragment, boot.fragments[at + 1])

    def _link(self, earlier: int, later: int) -> None:
        """Joins two neighbouring fragments of a boot where the steps follow each other."""
        end, start = self.first_step[earlier] + self.num_steps[earlier] - 1, self.first_step[later]
        frame = self.first_frame[later]
        same = self.episode[earlier] == self.episode[later]
        joined = frame == self.first_frame[earlier] + self.num_steps[earlier] if same else frame == 0
        self.next[end] = start if joined else -1
        self.prev[start] = end if joined else -1

    def span(self, first: int, end: int) -> tuple[int, int]:
        """The first step of the fragments from ``first`` up to ``end``, and how many they have."""
        start = int(self.first_step[first])
        return start, (int(self.first_step[end]) if end < self.num_fragments else self.end) - start

    def is_there(self, steps: np.ndarray) -> np.ndarray:
        """Which steps were not taken out, by their numbers: (N,) bool."""
        there: np.ndarray = steps >= self.fragment.first
        if self.gaps:
            start, count = np.array([self.span(*gap) for gap in self.gaps]).T
            at = np.searchsorted(start, steps, side="right") - 1
            there &= (at < 0) | (steps >= start[at] + count[at])
        return there

    def may_be_drawn(self, steps: np.ndarray, sources: Sequence[int]) -> np.ndarray:
        """Which steps are there, of these sources and of a task that is asked for: (N,) bool."""
        may: np.ndarray = self.is_there(steps) & (self.task[self.fragment[steps]] >= 0)
        return may & np.isin(self.source[steps], sources)

    def drop(self, first: int, end: int) -> None:
        """Takes the fragments from ``first`` up to ``end`` out: their steps are not drawn any more. In proportion to all."""
        start, count = self.span(first, end)
        for pool in self.pools.values():
            pool.keep((pool.view < start) | (pool.view >= start + count))
        gone_from = np.unique(self.episode[np.arange(first, end)])
        gone_from = gone_from[gone_from >= 0]
        self.episodes.first_step[gone_from] = -1
        for boot in self.boots.values():
            self._take_out(boot, first, end, gone_from)
        of_chunk = self.chunk_fragment.view
        gone = self.chunk_fragment.first + np.searchsorted(of_chunk, (first, end))
        chunk = self.chunk.view
        chunk[(chunk >= gone[0]) & (chunk < gone[1])] = -1  # policy calls of later steps, whose versions stay known
        before = next((gap for gap in self.gaps if gap[1] == first), (first, first))
        behind = next((gap for gap in self.gaps if gap[0] == end), (end, end))
        self.gaps = sorted([*(gap for gap in self.gaps if gap not in (before, behind)), (before[0], behind[1])])
        self.release()

    def _take_out(self, boot: _Boot, first: int, end: int, gone_from: np.ndarray) -> None:
        """Takes fragments out of their boot; ``gone_from`` are the episodes that lose some."""
        fragments = np.array(boot.fragments, np.int64)
        kept = np.flatnonzero((fragments < first) | (fragments >= end))
        if len(kept) == len(fragments):
            return
        boot.seqs, boot.fragments = [boot.seqs[i] for i in kept.tolist()], fragments[kept].tolist()
        if not len(kept):
            return
        for i in np.flatnonzero(np.diff(kept) > 1).tolist():  # only these have got another neighbour
            self._link(boot.fragments[i], boot.fragments[i + 1])
        oldest, newest = boot.fragments[0], boot.fragments[-1]
        self.prev[self.first_step[oldest]] = -1
        self.next[self.first_step[newest] + self.num_steps[newest] - 1] = -1
        left = fragments[kept]
        left = left[np.isin(self.episode[left], gone_from)]
        episodes, at = np.unique(self.episode[left], return_index=True)
        self.episodes.first_step[episodes] = self.first_step[left[at]]

    def release(self) -> None:
        """Lets go of the oldest fragments where all of them were taken out."""
        if not self.gaps or self.gaps[0][0] > self.num_steps.first:
            return
        _, released = self.gaps.pop(0)
        first_step = int(self.first_step[released]) if released < self.num_fragments else self.end
        first_chunk = self.chunk_fragment.first + int(np.searchsorted(self.chunk_fragment.view, released))
        for column in (self.chunk_fragment, self.chunk_row):
            column.release(first_chunk)
        for column in (self.fragment, self.next, self.prev, self.source, self.reward, self.flags, self.version, self.chunk):
            column.release(first_step)
        by_fragment = (self.first_step, self.num_steps, self.episode, self.first_frame, self.task, self.arena)
        places = (*self.places.values(), *self.offsets.values())
        for column in (*by_fragment, self.chunks_at, self.chunks_length, *places):
            column.extend_to(min(released, self.num_fragments))
            column.release(released)

    def places_of(self, name: str, fragments: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Offsets of a feature's first value in each fragment, ABSENT where there is none; and of an encoded one's offsets."""
        found = []
        for columns in (self.places, self.offsets):
            if name in columns:
                columns[name].extend_to(self.num_fragments)
            found.append(columns[name][fragments] if name in columns else None)
        at = np.full(len(fragments), ABSENT) if found[0] is None else found[0]
        return at, found[1]

    def steps_of(self, episode: int) -> np.ndarray:
        """Numbers of the steps of an episode that are there, in order."""
        boot = self.boots.get(self.episodes.keys[episode][:2], _Boot())
        mine = [f for f in boot.fragments if self.episode[f] == episode]
        spans = [np.arange(self.first_step[f], self.first_step[f] + self.num_steps[f]) for f in mine]
        return np.concatenate([np.empty(0, np.int64), *spans])

    def places_of_chunks(self, chunk_N: np.ndarray) -> np.ndarray:
        """Where policy calls lie: (N, 4) arena, offset, length, row; arena -1 where there is none any more."""
        found = np.full((len(chunk_N), 4), -1, np.int64)
        there = (chunk_N >= 0) & (chunk_N >= self.chunk_row.first)
        chunk = chunk_N[there]
        fragment = self.chunk_fragment[chunk]
        columns = (self.arena[fragment], self.chunks_at[fragment], self.chunks_length[fragment], self.chunk_row[chunk])
        found[there] = np.stack(columns, 1)
        return found

    def frame(self, steps: np.ndarray) -> np.ndarray:
        """frame_index of steps."""
        fragments = self.fragment[steps]
        frames: np.ndarray = self.first_frame[fragments] + self.row(steps, fragments)
        return frames

    def row(self, steps: np.ndarray, fragments: np.ndarray) -> np.ndarray:
        """Rows of steps in their fragments."""
        rows: np.ndarray = steps - self.first_step[fragments]
        return rows

    def walk(self, steps_B: np.ndarray, back: int, forward: int, within: Within) -> Walk:
        """Steps from ``back`` before to ``forward`` behind each of ``steps_B``.

        Beyond the border the last step inside of it is repeated. With BOOT the boot's real steps go on, and ``inside`` is
        False in other episodes than t's.
        """
        steps_BW = np.empty((len(steps_B), back + 1 + forward), np.int64)
        inside_BW = np.ones(steps_BW.shape, bool)
        steps_BW[:, back] = steps_B
        episode_B, source_B = self.episode[self.fragment[steps_B]], self.source[steps_B]
        for link, order in ((self.next, range(back + 1, back + 1 + forward)), (self.prev, range(back - 1, -1, -1))):
            now_B, inside_B = steps_B, np.ones(len(steps_B), bool)
            for w in order:
                then_B = link[now_B]
                exists_B = then_B >= 0
                then_B = np.where(exists_B, then_B, now_B)
                inside_B = inside_B & exists_B & (self.episode[self.fragment[then_B]] == episode_B)
                if within is Within.SOURCE:
                    inside_B &= self.source[then_B] == source_B
                now_B = then_B if within is Within.BOOT else np.where(inside_B, then_B, now_B)
                steps_BW[:, w], inside_BW[:, w] = now_B, inside_B
        return Walk(steps_BW, inside_BW, back)
