"""From the log to a batch: follows the committed fragments and draws windows of steps. Needs no server.

    poll      takes in what was committed since the last call, from the segments' index sidecars where there are any
    draw      decides which windows a batch is made of, by the rules of ``BatchNeeds``: cheap, numbers only
    gather    reads them out of the segments: heavy, and may run in other threads meanwhile

Several ranks (``Split``) make one batch together. Those that read one shard of the log all draw the shard's part of it, as
numbers, and each gathers its own rows. Several shards draw with seeds of their own, from their own steps; with ``balance``
they know of each other's, so that uneven shards give each source and task its share (``buffer.draw``).

A draw is a function of (seed, step, position in the log, what was fed back, the newest release), however the log was
read: at once or in bits, from sidecars or from the fragments, in whichever process. (Retention changes the log: a sampler
that saw it happen has the same steps in another order than one that began later.) An episode that still goes on is
sampled as it is: a window at its newest steps is shorter until the rest arrives.

Shape suffixes: B batch, H actions in a window, S shards, K sources, T tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buffer import groups
from buffer.draw import Accept, draw_part
from buffer.filters import both, passing
from buffer.follower import Follower
from buffer.gather import Allocate, Draw, ImageCache, gather
from buffer.portion import Portion
from buffer.team import Team
from buffer.undecodable import ENOUGH, Undecodable, put_first
from fleet.batch import WHOLE, BatchNeeds, Split, Windows
from fleet.journal import Journal
from fleet.robot import Source
from fleet.spec import RobotSpec

MAPPED_BYTES = 2 << 30  # a log of this size is read at the speed of memory


class Sampler:
    """One reader of a log. ``gather`` may be called from any thread, everything else from one.

    Args:
        folder: The run's buffer folder.
        task_names: Tasks whose steps are sampled; ``Windows.task_B`` counts in this order. Others are skipped.
        seed: Of all draws.
        journal: Where ``sampleable`` lines go.
        cache: Decoded images; None: each image is decoded whenever it is drawn.
        mapped_bytes: Bound of what mapped segments make resident. A larger log makes at most 256 MB of it so.
        threads: That copy or decode the images of one batch.
        split: Which rows of each batch this process makes.

    Attributes:
        index: What is known of all steps; ``index.episodes`` of all episodes.
        skipped_fragments: Fragments that could not be read, by the error's code.
        skipped_tasks: Steps of tasks that are not asked for, by task.
        undecodable: Windows that were left out because of their images.
    """

    def __init__(
        self,
        folder: Path,
        task_names: Sequence[str],
        seed: int,
        journal: Journal | None = None,
        *,
        cache: ImageCache | None = None,
        mapped_bytes: int = MAPPED_BYTES,
        threads: int = 2,
        split: Split = WHOLE,
    ) -> None:
        self._cache = cache
        self._log = Follower(folder, task_names, journal, mapped_bytes)
        self.index, self._maker, self._feedback = self._log.index, self._log.maker, self._log.feedback
        self.skipped_fragments, self.skipped_tasks = self._log.skipped_fragments, self._log.skipped_tasks
        self._portion, self._team = Portion(split, seed, len(task_names)), Team(threads)
        self.undecodable = Undecodable(self.index.episodes.keys, journal)

    @property
    def position(self) -> int:
        """Fragments read, of the log and of its labels: the position on which a draw depends."""
        return self._log.position

    @property
    def specs(self) -> list[RobotSpec]:
        """Specs of the robots whose steps were read."""
        return list(self._maker.specs.values())

    @property
    def skipped_steps(self) -> int:
        """Steps of other tasks."""
        return sum(self.skipped_tasks.values())

    @property
    def damaged(self) -> int:
        """Places in the log that could not be read."""
        return self._log.damaged

    def poll(self, limit: int | None = None) -> int:
        """Takes in what was committed since the last call, and the labels.

        Args:
            limit: At most so many fragments; then sidecars are not used.

        Returns:
            The number of new steps of the tasks that are asked for; what retention wrote anew is not new.
        """
        return self._log.poll(limit)

    def num_steps(self, source: Source | None = None) -> int:
        """Steps that can be drawn, of one source or of all."""
        counts_KT = self.counts()
        return int(counts_KT.sum() if source is None else counts_KT[source].sum())

    def counts(self) -> np.ndarray:
        """Steps that can be drawn where there is no filter, by source and task: (K, T) int64."""
        counts_KT = np.zeros((len(Source), len(self.index.task_names)), np.int64)
        for key, pool in self.index.pools.items():
            counts_KT[key] = len(pool.view)
        return counts_KT

    def balance(self, counts_SKT: np.ndarray) -> None:
        """Tells what all shards have: their ``counts``, (S, K, T). From the next draw on, shards together give each source
        and task its share, and each of its steps the same chance; ``Windows.shard_weight`` is part of that.

        What is counted are steps before filters and scores. So a shard of whose steps fewer pass a filter draws those that
        do more often, and scores choose among the steps of one shard, not between shards. With one shard nothing changes.

        Raises:
            LearnerError: The shape is another one.
        """
        self._portion.balance(counts_SKT)

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        """``draw`` and ``gather`` in one."""
        return self.gather(self.draw(needs, step, newest_version))

    def draw(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Draw:
        """Decides which windows this rank's rows of the batch of a step are made of; none where there are more ranks than
        rows.

        Args:
            newest_version: Newest release, for ``Filter.max_version_age``; -1: the newest one behind a step of the log.

        Raises:
            NoData: There is no step of the sources that ``needs`` names, or none passes its filter.
            SpecError: Robots of this log do not have the observations that ``needs`` names, or not in one shape.
        """
        names = set(needs.filter.tasks or self.index.task_names)
        tasks = {number for number, name in enumerate(self.index.task_names) if name in names}
        pools = {key: pool.view for key, pool in self.index.pools.items() if key[1] in tasks}
        scores = self._feedback.scores(needs, self._log.spans)
        accept = both(passing(self.index, needs.filter, newest_version), None if scores is None else scores.accept)
        cached = None if self._cache is None else self._cached(needs, self._cache)
        online_share, fill = self._feedback.online_share(needs), self._portion.fill(tasks)
        row_B, num_mine = self._portion.rows(needs.batch_size)
        steps_B, due = draw_part(pools, needs, accept, online_share, self._portion.rng(step), cached, len(row_B), fill)
        weight_B = np.ones(len(row_B), np.float32) if scores is None else scores.weights(steps_B)
        shard_weight = self._portion.shard_weight(due, weight_B, needs.batch_size)

        def first(num_rows: int) -> Draw:
            at = row_B[:num_rows] - row_B.min(initial=needs.batch_size)
            draw = self._maker.make(steps_B[at], needs, step, self.position, self._log.arenas)
            draw.facts.update(weight_B=weight_B[at], index_B=row_B[:num_rows], shard_weight=shard_weight)
            return draw

        few = 0 < num_mine < min(ENOUGH, len(row_B)) and self._encoded(needs)
        return dataclasses.replace(first(num_mine), wider=first(ENOUGH) if few else None)

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None:
        """Takes losses: of these windows as scores of their steps, where needs have a priority, and of the whole batch for
        adaptive mixtures.

        Ranks keep the scores of their own rows: a step's score is that of the rank that had it last, as far as it knows.

        Args:
            table: ``buffer.mixture.loss_table`` of these windows, added up over all ranks.

        Raises:
            LearnerError: A loss is not finite, or below 0 where steps are drawn by score.
        """
        self._feedback.add(windows, loss_B, table, self.index.is_there(windows.step_B))

    def state(self) -> dict[str, Any]:
        """What was fed back and up to where the log was read, for a checkpoint: plain dicts, lists, numbers, numpy arrays.

        Any rank that reads the same shard can take it, also where there is another number of ranks then. Scores are this
        rank's own: those that the others gave to their rows are not in it.
        """
        return {**self._feedback.state(self._log.spans()), "read": self._log.state()}

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Takes what ``state`` returned, also in another process; before the first ``draw``, after a ``poll``.

        Returns:
            The number of steps that came since, of the tasks that are asked for; what retention took meanwhile is not missed.
            Of another shard's state all steps are new, and scores are nobody's.
        """
        self._feedback.load_state(state)
        return self._log.steps_since(state["read"])

    def reads(self, state: Mapping[str, Any]) -> bool:
        """Whether a ``state`` is of the log that is read here, as far as both were read; after a ``poll``."""
        return self._log.reads(state["read"])

    def groups(self, **options: Any) -> list[np.ndarray]:
        """Groups of episodes for GRPO: ``buffer.groups.groups``."""
        return groups.groups(self.index.episodes, **options)

    def pairs(self, num: int, step: int, **options: Any) -> np.ndarray:
        """Pairs of episodes for DPO, (num, 2), a function of (seed, shard, step, position): ``buffer.groups.pairs``."""
        return groups.pairs(self.index.episodes, self._portion.rng(step), num, **options)

    def gather(self, draw: Draw, out: Allocate | None = None) -> Windows:
        """Reads the windows of a draw. From any thread, also while others poll and draw.

        Args:
            out: Gives the arrays for observations and actions; None: new ones.

        Raises:
            StorageError: The disk cannot be read, or more than half of the batch has images that cannot be decoded.
        """
        windows, bad = gather(draw, out or _new_array, self._cache, self._log.residency, self._team)
        if bad and draw.wider is not None and self.undecodable.too_many(windows, bad):
            wider, bad = gather(draw.wider, _new_array, self._cache, self._log.residency, self._team)
            self.undecodable.leave_out(wider, bad)
            put_first(windows, wider)
        elif bad:
            self.undecodable.leave_out(windows, bad)
        return windows

    def windows_of(self, episodes: Sequence[int], needs: BatchNeeds, stride: int = 1) -> Draw:
        """All windows at every ``stride``-th frame of these episodes (``index.episodes``), in order."""
        steps = [self.index.steps_of(number) for number in episodes]
        every = [s[self.index.frame(s) % stride == 0] for s in steps]
        return self.windows_at(np.concatenate([np.empty(0, np.int64), *every]), needs)

    def windows_at(self, steps_B: np.ndarray, needs: BatchNeeds) -> Draw:
        """The windows at these steps of the index, in order."""
        return self._maker.make(steps_B.copy(), needs, -1, self.position, self._log.arenas)  # gathering may replace some

    def close(self) -> None:
        self._log.close()
        self._team.close()

    def _encoded(self, needs: BatchNeeds) -> tuple[str, ...]:
        """The observations that are stored encoded: images."""
        return tuple(name for name in needs.observations if self._maker.feature(name).codec != "raw")

    def _cached(self, needs: BatchNeeds, cache: ImageCache) -> Accept | None:
        """Which steps have all their images in the cache; None where none are encoded."""
        names = self._encoded(needs) if needs.cached_share and self._maker.specs else ()  # an empty shard has no features
        return (lambda steps: cache.cached(steps, names)) if names else None


def _new_array(_: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.empty(shape, dtype)
