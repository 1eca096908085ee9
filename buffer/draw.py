"""Which steps a batch is made of: the rules of ``BatchNeeds``, on plain arrays of step numbers.

A batch is split over leaves, each a set of steps that are drawn alike:

    shares    a group of sources  ->  its tasks, each with the same weight (``by_task``), or all its steps in one leaf
    adaptive  a task, each with the same weight  ->  its online side with the share w, its offline side with 1 - w

A leaf without acceptable steps gives its weight to the others of its branch, a branch without any to the other
branches. Whole numbers by ``split_by_share``: the mean of each leaf's number is its weight of the batch, exactly. In a
leaf a step is drawn, with replacement, in proportion to ``accept(step)``. Every source by itself is one share per source;
RLPD's symmetric batch is two shares, one half each.

Proposals are drawn uniformly and kept with the probability ``accept(step)``, which costs O(B) while acceptance is not
tiny; when going through the whole leaf is cheaper, that is done. Both are exact, and so is changing from one to the
other: how many were kept so far says nothing about which step is kept next.

``cached_share``: of each leaf's windows each one is, with the probability beta, drawn by the leaf's rule restricted to
cached steps. The leaf's distribution is then (1 - b) P + b Q with b <= beta, whose total-variation distance to the rule P
is b TV(P, Q) <= beta; shares of sources and tasks stay exact. Where few cached steps are found (none, say), the rest
falls back to P, which makes b smaller.

Several shards (``Fill``), each of which draws its part of the batch from its own steps: the weights of leaves follow from
all shards' steps, and each shard draws a leaf in proportion to its weight times the shard's part of the leaf's steps. What
these sum up to is the shard's due part of the batch; if it makes more or fewer rows than that, they must count for less or
more. Then every leaf has its weight over all shards, and every step of a leaf the same chance whatever shard it is in.
A leaf that only other shards have keeps its weight there. One without an acceptable step here is taken for one without any
in all shards while its branch has others, else for one that others draw: only numbers of steps are known of other shards.

Shape suffixes: B batch, K sources, T tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fleet.batch import BatchNeeds, Filter
from fleet.errors import NoData
from fleet.robot import Source

Pools = Mapping[tuple[int, int], np.ndarray]
"""(source, task) -> step numbers, int64."""
Accept = Callable[[np.ndarray], np.ndarray]
"""Step numbers -> probability in [0, 1] of keeping each: 0 or 1 of a filter, score / highest score of a priority."""

_SPARE = 8  # proposals of a leaf beyond twice what it probably needs: few leaves need a second round
_PATIENCE = 1024  # proposals without a kept one before the whole leaf is gone through
_CACHED_TRIES = 32  # proposals for each window that should be a cached one


@dataclasses.dataclass(frozen=True)
class Fill:
    """Numbers of steps, before any filter, by source and task: of this shard (K, T), and of all shards together (K, T)."""

    here_KT: np.ndarray
    all_KT: np.ndarray


def draw_part(
    pools: Pools,
    needs: BatchNeeds,
    accept: Accept | None,
    online_share: Callable[[int], float] | None,
    rng: np.random.Generator,
    cached: Accept | None,
    num_rows: int,
    fill: Fill | None,
) -> tuple[np.ndarray, float]:
    """What one shard draws of a batch. A function of its arguments and the state of ``rng``.

    Ranks of a shard call this with equal ``rng``. Where their scores or caches differ, so do their steps, but each row is
    of the same leaf for all of them.

    Args:
        pools: All steps by source and task.
        needs: ``shares`` or ``adaptive``, ``by_task`` and ``cached_share`` are used.
        accept: None: all steps alike.
        online_share: By task, where ``needs.adaptive`` is given.
        cached: True for steps that ``cached_share`` prefers.
        num_rows: B, of this shard.
        fill: None: there is one shard, or nothing is known of the others.

    Returns:
        First steps of the windows (B,), int64, in random order; and the part of the whole batch that is due to this shard,
        in (0, 1], 1 without ``fill``.

    Raises:
        NoData: No step of the sources that are asked for is acceptable.
    """
    leaves = _leaves(pools, needs, online_share, fill)
    whole = sum({leaf.branch: leaf.branch_weight for leaf in leaves}.values())
    here = [leaf for leaf in leaves if leaf.size and leaf.part > 0]
    picks = rng if accept is None and cached is None else rng.spawn(1)[0]  # of these, ranks may need different numbers
    if accept is not None:
        _propose(here, num_rows, accept, picks)
        dead = {leaf for leaf in here if not leaf.alive(accept, picks)}
        here, leaves = ([leaf for leaf in some if leaf not in dead] for some in (here, leaves))
    if not here:
        raise _no_data(pools, needs)
    weight_of = dict(zip(leaves, _weights(leaves).tolist(), strict=True))
    weights = [weight_of[leaf] * leaf.part for leaf in here]
    counts = split_by_share(num_rows, weights, rng.random())
    drawn = []
    for leaf, count in zip(here, counts, strict=True):
        if not count:
            continue
        steps = leaf.draw(count, accept, picks)
        if cached is not None and needs.cached_share > 0:
            preferred = leaf.prefer(int(picks.binomial(count, needs.cached_share)), accept, cached, picks)
            steps[: len(preferred)] = preferred
        drawn.append(steps)
    steps_B = rng.permutation(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)
    return steps_B, 1.0 if fill is None else sum(weights) / whole


def split_by_share(total: int, shares: Sequence[float] | np.ndarray, offset: float) -> list[int]:
    """Whole numbers that sum to ``total`` and whose mean over offsets in [0, 1) is exactly each share of it.

    Each is its share of the total rounded down or up, and so is the sum of neighbours.
    """
    ends = np.cumsum(np.asarray(shares, np.float64))
    edges = np.floor(total * (ends / ends[-1]) + offset).astype(np.int64)
    edges[-1] = total
    return [int(count) for count in np.diff(edges, prepend=0)]


class _Leaf:
    """Steps that are drawn alike, in several arrays.

    Args:
        branch, branch_weight, weight: The branch that it belongs to, with its weight; the leaf's weight within it.
        part: Of its steps in all shards, the part that is in this one.
        arrays: Its steps in this shard.
    """

    def __init__(self, branch: int, branch_weight: float, weight: float, part: float, arrays: list[np.ndarray]) -> None:
        self.branch, self.branch_weight, self.weight, self.part = branch, branch_weight, weight, part
        self._arrays, self._ends = arrays, np.cumsum([len(array) for array in arrays])
        self.size = sum(len(array) for array in arrays)
        self._kept: list[np.ndarray] = []
        self._num_kept = self._num_tried = 0
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def pick(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Steps drawn uniformly."""
        at = rng.integers(self.size, size=count)
        if len(self._arrays) == 1:
            return self._arrays[0][at]
        which = np.searchsorted(self._ends, at, side="right")
        out = np.empty(count, np.int64)
        for number, array in enumerate(self._arrays):
            mine = which == number
            out[mine] = array[at[mine] - (self._ends[number] - len(array))]
        return out

    def keep(self, steps: np.ndarray, kept: np.ndarray) -> None:
        """Notes which proposals were kept."""
        chosen = steps[kept]
        self._kept.append(chosen)
        self._num_kept += len(chosen)
        self._num_tried += len(steps)

    def alive(self, accept: Accept, rng: np.random.Generator) -> bool:
        """Whether there is an acceptable step."""
        self._want(1, accept, rng)
        return self._num_kept > 0 or (self._table is not None and len(self._table[0]) > 0)

    def draw(self, count: int, accept: Accept | None, rng: np.random.Generator) -> np.ndarray:
        """``count`` steps by the leaf's rule."""
        if accept is None:
            return self.pick(count, rng)
        self._want(count, accept, rng)
        kept = np.concatenate(self._kept)[:count] if self._kept else np.empty(0, np.int64)
        missing = count - len(kept)
        if not missing or self._table is None:
            return kept
        steps, ends = self._table
        at = np.searchsorted(ends, rng.random(missing) * ends[-1], side="right")
        return np.concatenate([kept, steps[np.minimum(at, len(steps) - 1)]])

    def prefer(self, count: int, accept: Accept | None, cached: Accept, rng: np.random.Generator) -> np.ndarray:
        """At most ``count`` steps by the leaf's rule restricted to cached ones."""
        steps: np.ndarray = self.pick(_CACHED_TRIES * count, rng)
        steps = steps[np.asarray(cached(steps), bool)]
        if accept is not None and len(steps):
            steps = steps[rng.random(len(steps)) < accept(steps)]
        return steps[:count]

    def _want(self, count: int, accept: Accept, rng: np.random.Generator) -> None:
        """Keeps proposals until there are ``count`` or a table of the leaf is cheaper."""
        while self._num_kept < count and self._table is None:
            tries = (count - self._num_kept) * self._num_tried / max(self._num_kept, 1)
            hopeless = self._num_kept == 0 and self._num_tried >= _PATIENCE
            if hopeless or max(tries, self._num_tried) >= self.size:
                self._make_table(accept)
            else:
                steps = self.pick(int(1.2 * tries) + _SPARE, rng)
                self.keep(steps, rng.random(len(steps)) < accept(steps))

    def _make_table(self, accept: Accept) -> None:
        steps = np.concatenate(self._arrays)
        chance = np.asarray(accept(steps), np.float64)
        steps, chance = steps[chance > 0], chance[chance > 0]
        self._table = steps, np.cumsum(chance)


def _leaves(pools: Pools, needs: BatchNeeds, online_share: Callable[[int], float] | None, fill: Fill | None) -> list[_Leaf]:
    """Leaves that have steps, here or in other shards, and weight, in an order that depends on nothing else."""
    there = {key: len(steps) for key, steps in pools.items()} if fill is None else _by_key(fill.all_KT)
    here = there if fill is None else _by_key(fill.here_KT)
    keys = sorted(key for key, count in there.items() if count)

    def leaf(branch: int, branch_weight: float, weight: float, chosen: Iterable[tuple[int, int]]) -> list[_Leaf]:
        mine = list(chosen)
        if not mine or branch_weight <= 0 or weight <= 0:
            return []
        part = sum(here[key] for key in mine) / sum(there[key] for key in mine)
        arrays = [pools[key] for key in mine if len(pools.get(key, ()))]
        return [_Leaf(branch, branch_weight, weight, part, arrays)]

    leaves: list[_Leaf] = []
    if needs.adaptive is not None:
        for task in sorted({task for _, task in keys}):
            share = 0.5 if online_share is None else online_share(task)
            for sources, weight in ((needs.adaptive.online, share), (needs.adaptive.offline, 1 - share)):
                leaves += leaf(task, 1.0, weight, (key for key in keys if key[1] == task and key[0] in sources))
        return leaves
    for branch, (sources, share) in enumerate(needs.shares.items()):
        wanted = sorted((key for key in keys if key[0] in sources), key=lambda key: key[1])
        by_task = itertools.groupby(wanted, key=lambda key: key[1] if needs.by_task else 0)
        for _, chosen in by_task:
            leaves += leaf(branch, share, 1.0, chosen)
    return leaves


def _by_key(counts_KT: np.ndarray) -> dict[tuple[int, int], int]:
    return {(source, task): int(count) for (source, task), count in np.ndenumerate(counts_KT)}


def _weights(leaves: list[_Leaf]) -> np.ndarray:
    """Each leaf's part of the batch: its part of its branch times the branch's part."""
    within: dict[int, float] = {}
    for leaf in leaves:
        within[leaf.branch] = within.get(leaf.branch, 0.0) + leaf.weight
    return np.array([leaf.branch_weight * leaf.weight / within[leaf.branch] for leaf in leaves])


def _propose(leaves: list[_Leaf], total: int, accept: Accept, rng: np.random.Generator) -> None:
    """The first proposals of all leaves, judged in one call."""
    if not leaves:
        return
    weights = _weights(leaves) * [leaf.part for leaf in leaves]
    counts = (2 * total * weights / weights.sum()).astype(np.int64) + _SPARE
    steps = [leaf.pick(int(count), rng) for leaf, count in zip(leaves, counts, strict=True)]
    together = np.concatenate(steps)
    kept = rng.random(len(together)) < accept(together)
    for leaf, mine, judged in zip(leaves, steps, np.split(kept, np.cumsum(counts)[:-1]), strict=True):
        leaf.keep(mine, judged)


def _no_data(pools: Pools, needs: BatchNeeds) -> NoData:
    groups = needs.shares if needs.adaptive is None else (needs.adaptive.online, needs.adaptive.offline)
    have: dict[str, int] = {}
    for (source, _), steps in sorted(pools.items()):
        name = Source(source).name.lower()
        have[name] = have.get(name, 0) + len(steps)
    passes = " passes the filter" if needs.filter != Filter() or needs.priority else ""
    return NoData(
        f"no step of {[source.name.lower() for sources in groups for source in sources]}{passes}; "
        f"the log has {have or 'nothing'}",
        rule="a batch needs at least one acceptable step of the sources that are asked for",
        remedy="wait for robots, collect demonstrations, or widen the filter",
    )
