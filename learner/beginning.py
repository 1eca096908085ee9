"""What a run's learner begins with: enough data, a policy that fits its robots, and the data's mean and deviation.

All ranks take part, and come to the same.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from algorithms.policies.base import PolicySpec
from algorithms.policies.registry import FAMILIES, build
from algorithms.policies.statistics import Statistics
from fleet.batch import BatchNeeds, Windows
from fleet.errors import LearnerError, NoData
from fleet.journal import Journal
from fleet.lookup import resolve
from fleet.robot import Source
from fleet.spec import ACTION, RobotSpec
from learner.checkpoint import Checkpoint
from learner.main import PolicyConfig
from learner.progress import Progress
from learner.ranks import Ranks
from learner.supply import POLL_S, BatchSource
from learner.tensor_file import pack, to_arrays, unpack

SETTINGS = ("learner", "engine", "policy", "algorithm", "start")  # tables that say what is trained, and how
STATISTICS_STEPS = 8192  # drawn from the demonstrations, to normalise observations by


def wait_for_data(
    source: BatchSource,
    min_size: int,
    ranks: Ranks,
    stop: Callable[[], bool],
    report: Callable[[Progress], None],
    journal: Journal,
) -> bool:
    """Waits until the shards together have ``min_size`` steps; False when ``stop`` of any rank came first."""
    said = False
    ranks.patiently(source.poll)  # the first look at a long log
    while True:
        source.poll()
        table = ranks.gather([source.num_steps(), stop()])
        num_steps = int(table[ranks.place.leaders, 0].sum())
        if num_steps >= min_size or table[:, 1].any():
            return num_steps >= min_size
        why = (
            f"the learner waits for data: the buffer has {num_steps} steps, learner.min_size_to_sample is {min_size}; "
            "give demonstrations with `fleet join FILE --demonstrate 10`"
        )
        if not said and ranks.first:
            journal.write("waiting", why=why, step=0)
        said = True
        line = f"learner waits for data: {min_size - num_steps:,} more steps"
        report(Progress(num_steps=num_steps, waiting=why, pace=line))
        time.sleep(POLL_S)


def make_policy(
    table: PolicyConfig,
    checkpoint: Checkpoint | None,
    specs: list[RobotSpec],
    instruction_dim: int,
    source: BatchSource,
    ranks: Ranks,
) -> tuple[nn.Module, dict[str, Any]]:
    """A policy with its first weights and statistics, or as the checkpoint describes it; and its description.

    Args:
        specs: Of the robots of all shards.

    Raises:
        LearnerError: Robots share no action or observation, or the checkpoint holds another policy.
    """
    if checkpoint is not None:
        described = checkpoint.meta["policy"]
        check_same_policy(table, described, checkpoint)
        return build(described["family"], described["config"]), described
    described = complete_policy(table, specs, instruction_dim)
    policy = build(described["family"], described["config"])
    fit_statistics(policy, source, ranks)
    return policy, described


def complete_policy(table: PolicyConfig, specs: list[RobotSpec], instruction_dim: int) -> dict[str, Any]:
    """Family and whole config of a policy: what the run file leaves open is read off the robots' specs and the tasks.

    Raises:
        LearnerError: The robots of this run do not share an action or an observation.
    """
    fields = set(resolve(FAMILIES, table.family, kind="policy family", error=LearnerError).Config.__dataclass_fields__)
    sizes = sorted({spec.action.size for spec in specs})
    if len(sizes) != 1:
        raise LearnerError(f"robots of this run have actions of {sizes} dims", rule="one policy has one action dimension")
    shared = {
        name: list(feature.shape)
        for name, feature in specs[0].observations.items()
        if not feature.is_image and all(name in s.features and s.features[name].shape == feature.shape for s in specs)
    }
    derived: dict[str, Any] = {"reads": shared, "action_dim": sizes[0], "instruction_dim": instruction_dim}
    config = {**{name: value for name, value in derived.items() if name in fields}, **table.config}
    if "reads" in fields and not config["reads"]:
        raise LearnerError(
            "the robots of this run share no observation", rule="a policy reads something", remedy="set policy.config.reads"
        )
    return {"family": table.family, "config": config}


def check_same_policy(table: PolicyConfig, described: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises LearnerError when the configuration names another policy than the checkpoint holds."""
    different = {"family": (described["family"], table.family)} if described["family"] != table.family else {}
    for name, value in table.config.items():
        if _plain(described["config"].get(name)) != _plain(value):
            different[f"config.{name}"] = (described["config"].get(name), value)
    for name, (old, new) in different.items():
        raise LearnerError(
            f"policy.{name} = {new!r}, but the checkpoint of step {checkpoint.step} has {old!r}",
            rule="a run goes on with the policy that it began with",
            remedy="put the setting back, or start a new run",
        )


def fit_statistics(policy: Any, source: BatchSource, ranks: Ranks) -> None:
    """Gives a policy that normalises its inputs their mean and standard deviation, from demonstrations if there are any: over
    the rows of all ranks, each counting what its shard weighs.

    Raises:
        NoData: No rank has a step.
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
    weight = np.concatenate([part["weight"] for part in rows])
    return {n: Statistics.of(np.concatenate([part[n] for part in rows]), weight) for n in (*spec.vectors, ACTION)}


def settings_of(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's tables as plain data, for the next process to compare with."""
    plain: dict[str, Any] = _plain({name: dataclasses.asdict(table) for name, table in tables.items() if name in SETTINGS})
    return plain


def changed_settings(old: Any, new: Any, key: str = "") -> dict[str, list[Any]]:
    """Old and new value by key, for example ``algorithm.config.learning_rate``; None where there was or is none."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return {key: [old, new]} if old != new else {}
    changed: dict[str, list[Any]] = {}
    for name in {**old, **new}:
        changed |= changed_settings(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return changed


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
