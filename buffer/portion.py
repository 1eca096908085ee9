"""Which portion of each batch a rank makes, and what its shard of the log counts for among all shards.

Shape suffixes: B rows of a shard's part of a batch, S shards, K sources, T tasks.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from buffer.draw import Fill
from fleet.batch import Split
from fleet.errors import LearnerError
from fleet.robot import Source


class Portion:
    """What follows from a ``Split``.

    Args:
        seed: Of all draws.
    """

    def __init__(self, split: Split, seed: int, num_tasks: int) -> None:
        self._split, self._seed, self._num_tasks = split, seed, num_tasks
        self._counts_SKT: np.ndarray | None = None

    def balance(self, counts_SKT: np.ndarray) -> None:
        """Takes the steps of all shards. With one shard nothing changes.

        Raises:
            LearnerError: The shape is another one.
        """
        shape = (self._split.num_shards, len(Source), self._num_tasks)
        if counts_SKT.shape != shape:
            what = f"steps of all shards are counted in the shape {counts_SKT.shape}"
            raise LearnerError(what, rule=f"it is (shards, sources, tasks), {shape}")
        self._counts_SKT = counts_SKT.copy() if len(counts_SKT) > 1 else None

    def rng(self, step: int) -> np.random.Generator:
        """Of a step's draw: the same for all ranks of a shard."""
        shard = [self._split.shard] if self._split.num_shards > 1 else []
        return np.random.default_rng([self._seed, step, *shard])

    def rows(self, batch_size: int) -> tuple[np.ndarray, int]:
        """Rows of the shard (B,) in the batch of all ranks, this rank's first; and how many are this rank's."""
        of_shard, mine = self._split.shard_rows(batch_size), self._split.rows(batch_size)
        return np.roll(np.arange(of_shard.start, of_shard.stop), of_shard.start - mine.start), len(mine)

    def fill(self, tasks: Collection[int]) -> Fill | None:
        """What shards have of these tasks; None where there is one shard, or nothing is known of the others."""
        if self._counts_SKT is None:
            return None
        asked_T = np.isin(np.arange(self._num_tasks), list(tasks))
        return Fill(self._counts_SKT[self._split.shard] * asked_T, self._counts_SKT.sum(0) * asked_T)

    def shard_weight(self, due: float, weight_B: np.ndarray, batch_size: int) -> float:
        """The factor with which the weights of the shard's rows sum up to the part of the batch that is due to it."""
        if self._counts_SKT is None or not len(weight_B):
            return 1.0
        return due * batch_size / float(weight_B.sum())
