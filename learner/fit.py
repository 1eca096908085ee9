"""What is known of a feature's values in a run's data, for policies to normalise by."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    """Gives a policy that normalises what it reads and writes the statistics of its vector features and of the actions, from
    demonstrations if there are any: over the rows of all ranks, each counting what its shard weighs.

    Raises:
        NoData: No rank has a step.
        LearnerError: A value is not finite; names the feature.
    """
    if not hasattr(policy, "set_statistics"):
        return
    if ranks.place.num_shards > 1:
        counts_KT = source.counts()
        table = ranks.gather(counts_KT)[ranks.place.leaders]
        source.balance(table.astype(np.int64))
    lack: NoData | None = None
    for sources in ((Source.DEMO,), tuple(Source)):
        windows: Windows | None = None
        try:
            windows = source.batch(BatchNeeds(STATISTICS_STEPS, 1, tuple(policy.spec.vectors), {sources: 1.0}), 0)
        except NoData as error:
            lack = error
        statistics = _statistics(policy.spec, windows, ranks)
        if statistics:
            policy.set_statistics(statistics)
            return
    raise lack or NoData("no step to take statistics from")


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
