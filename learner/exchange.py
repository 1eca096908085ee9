"""What ranks tell each other once an update. Every decision of the loop follows from ``Known``, which is the same on all."""

from __future__ import annotations

import dataclasses

import numpy as np

from learner.ranks import Ranks

_NONE = 2**53  # above every version


@dataclasses.dataclass
class Facts:
    """What one rank knows.

    stop: It was told to end. has_batch: It has its rows of the next batch. wants_loan: It has none, nor any of before that
    would do. release: The newest one, of rank 0. new_steps: Since it was asked last. counts_KT: Steps that can be drawn from
    its shard, by source and task. versions: Of the policies behind its rows, where there are any.
    """

    counts_KT: np.ndarray
    stop: bool = False
    has_batch: bool = False
    wants_loan: bool = False
    release: int = 0
    new_steps: int = 0
    versions: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))


@dataclasses.dataclass(frozen=True)
class Known:
    """What all ranks know. new_steps, counts_SKT: from the first rank of each shard. version_*: of all rows of the batch;
    ``version_num`` 0 where no policy was behind any."""

    counts_SKT: np.ndarray
    stop: bool
    with_batch: tuple[int, ...]
    wants_loan: bool
    release: int
    new_steps: int
    version_sum: float
    version_num: int
    version_min: int

    @property
    def num_steps(self) -> int:
        """In all shards."""
        return int(self.counts_SKT.sum())

    @property
    def oldest(self) -> int:
        """Releases between the newest one and that behind the batch's oldest step."""
        return max(self.release - self.version_min, 0) if self.version_num else 0

    def staleness(self) -> dict[str, float]:
        """Of the batch, in releases: mean and largest; nothing where no policy was behind a step."""
        if not self.version_num:
            return {}
        mean = self.release - self.version_sum / self.version_num
        return {"staleness_mean": max(mean, 0.0), "staleness_max": float(self.oldest)}


def exchange(ranks: Ranks, facts: Facts) -> Known:
    """Makes one of all ranks' facts. Every rank calls it, once."""
    versions = facts.versions
    flags = [facts.stop, facts.has_batch, facts.wants_loan, facts.release, facts.new_steps]
    ages = [versions.sum(), len(versions), versions.min(initial=_NONE)]
    table = ranks.gather(np.concatenate([np.array(flags + ages, np.float64), facts.counts_KT.ravel()]))
    leaders = ranks.place.leaders
    stop, has_batch, wants_loan, release, new_steps, version_sum, version_num, version_min = table[:, :8].T
    return Known(
        counts_SKT=table[leaders, 8:].astype(np.int64).reshape(len(leaders), *facts.counts_KT.shape),
        stop=bool(stop.any()),
        with_batch=tuple(np.flatnonzero(has_batch).tolist()),
        wants_loan=bool(wants_loan.any()),
        release=int(release[0]),
        new_steps=int(new_steps[leaders].sum()),
        version_sum=float(version_sum.sum()),
        version_num=int(version_num.sum()),
        version_min=int(version_min.min()),
    )
