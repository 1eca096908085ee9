"""What is known of a run's data before anything is trained: for policies and critics to normalise by."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from algorithms.base import DataFacts
from algorithms.policies.base import PolicySpec
from algorithms.policies.statistics import Statistics
from fleet.batch import BatchNeeds, Windows
from fleet.errors import LearnerError, NoData
from fleet.robot import Source
from fleet.spec import ACTION
from learner.ranks import Ranks
from learner.supply import BatchSource
from learner.tensor_file import pack, to_arrays, unpack

STATISTICS_STEPS = 8192  # drawn from the demonstrations by each rank


def fit_statistics(policy: Any, source: BatchSource, ranks: Ranks) -> None:
    """Gives a policy that normalises what it reads and writes its statistics, see ``data_facts``."""
    if hasattr(policy, "set_statistics"):
        policy.set_statistics(data_facts(policy.spec, source, (), ranks).statistics)


def data_facts(spec: PolicySpec, source: BatchSource, tasks: Sequence[str], ranks: Ranks) -> DataFacts:
    """Statistics of a policy's vector features and of the actions, from demonstrations if there are any, and the longest
    episodes: over rows that all ranks draw, each counting what its shard weighs.

    Args:
        tasks: Names, in the order of the sampler's.

    Raises:
        NoData: No rank has a step.
        LearnerError: A value is not finite; names the feature.
    """
    if ranks.place.num_shards > 1:
        counts_KT = source.counts()
        table = ranks.gather(counts_KT)[ranks.place.leaders]
        source.balance(table.astype(np.int64))
    lack: NoData | None = None
    for sources in ((Source.DEMO,), tuple(Source)):
        windows: Windows | None = None
        try:
            windows = source.batch(BatchNeeds(STATISTICS_STEPS, 1, tuple(spec.vectors), {sources: 1.0}), 0)
        except NoData as error:
            lack = error
        statistics = _statistics(spec, windows, ranks)
        if statistics:
            return DataFacts(tuple(tasks), statistics, _longest(source, len(tasks), ranks))
    raise lack or NoData("no step to take statistics from")


def _longest(source: BatchSource, num_tasks: int, ranks: Ranks) -> tuple[int, ...]:
    """Steps of the longest finished episode of each task among those that were drawn, of all ranks."""
    longest_T = np.zeros(num_tasks)
    if num_tasks:
        with contextlib.suppress(NoData):
            windows = source.batch(BatchNeeds(STATISTICS_STEPS, 1, (), {tuple(Source): 1.0}), 0)
            finished_B = windows.steps_to_go_B >= 0
            length_B = windows.frame_B + windows.steps_to_go_B
            np.maximum.at(longest_T, windows.task_B[finished_B], length_B[finished_B])
        longest_T = ranks.gather(longest_T).max(0)
    return tuple(int(steps) for steps in longest_T)


def _statistics(spec: PolicySpec, windows: Windows | None, ranks: Ranks) -> dict[str, Statistics]:
    """Of the vector features and of the action, over the rows of all ranks; empty where no rank has one."""
    mine: dict[str, np.ndarray] = {}
    if windows is not None:
        mine = {**{name: windows.obs[name] for name in spec.vectors}, ACTION: windows.actions_BHA[:, 0]}
        mine["weight"] = np.full(len(windows.step_B), windows.shard_weight)
    told = [to_arrays(unpack(data)) for data in ranks.gather_bytes(pack(mine))] if ranks.size > 1 else [mine]
    rows = [part for part in told if len(part.get("weight", ())) and part["weight"].sum() > 0]
    if not rows:
        return {}
    joined = {name: np.concatenate([part[name] for part in rows]) for name in (*spec.vectors, ACTION, "weight")}
    for name, values in joined.items():
        bad = ~np.isfinite(values.reshape(len(values), -1))
        if bad.any():
            raise LearnerError(
                f"{name!r} is not finite in {int(bad.any(1).sum())} of {len(values)} steps that were drawn, "
                f"in elements {np.flatnonzero(bad.any(0))[:8].tolist()}",
                rule="what a policy is normalised by is finite",
                remedy="find the episodes with `fleet data list` and leave them out with `fleet data exclude`",
            )
    return {name: Statistics.of(joined[name], joined["weight"]) for name in (*spec.vectors, ACTION)}
