"""What ranks tell each other once an update. Every decision of the loop follows from ``Known``, which is the same on all."""

from __future__ import annotations

import dataclasses

import numpy as np

from learner.ranks import Ranks


@dataclasses.dataclass
class Facts:
    """What one rank knows.

    stop: It was told to end. has_batch: It has its rows of the next batch. wants_loan: It has none, nor any of before that
    would do. release: The newest one, of rank 0. new_steps: Since it was asked last. counts_KT: Steps that can be drawn from
    its shard, by source and task. age_sum, age_num, age_max: Of its rows, newest release minus version, where they have one.
    """

    counts_KT: np.ndarray
    stop: bool = False
    has_batch: bool = False
    wants_loan: bool = False
    release: int = 0
    new_steps: int = 0
    age_sum: float = 0.0
    age_num: int = 0
    age_max: float = 0.0


@dataclasses.dataclass(frozen=True)
class Known:
    """What all ranks know. new_steps, counts_SKT: by shard, from the first rank of each."""

    counts_SKT: np.ndarray
    stop: bool
    with_batch: tuple[int, ...]
    wants_loan: bool
    release: int
    new_steps: int
    age_sum: float
    age_num: int
    age_max: float

    @property
    def num_steps(self) -> int:
        """In all shards."""
        return int(self.counts_SKT.sum())

    def staleness(self) -> dict[str, float]:
        """Of the batch: mean and largest; nothing where no step has a version."""
        return {"staleness_mean": self.age_sum / self.age_num, "staleness_max": self.age_max} if self.age_num else {}


def exchange(ranks: Ranks, facts: Facts) -> Known:
    """Makes one of all ranks' facts. Every rank calls it, once."""
    flags = [facts.stop, facts.has_batch, facts.wants_loan, facts.release, facts.new_steps]
    ages = [facts.age_sum, facts.age_num, facts.age_max]
    table = ranks.gather(np.concatenate([np.array(flags + ages, np.float64), facts.counts_KT.ravel()]))
    leaders = ranks.place.leaders
    stop, has_batch, wants_loan, release, new_steps, age_sum, age_num, age_max = table[:, :8].T
    return Known(
        counts_SKT=table[leaders, 8:].astype(np.int64).reshape(len(leaders), *facts.counts_KT.shape),
        stop=bool(stop.any()),
        with_batch=tuple(np.flatnonzero(has_batch).tolist()),
        wants_loan=bool(wants_loan.any()),
        release=int(release[0]),
        new_steps=int(new_steps[leaders].sum()),
        age_sum=float(age_sum.sum()),
        age_num=int(age_num.sum()),
        age_max=float(age_max.max()),
    )
