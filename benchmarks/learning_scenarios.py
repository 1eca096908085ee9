"""Where the benchmark of learning compares methods: tasks, demonstrations, who helps, how much of everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.learning_methods import BATCH, CLONING, EVERY, MAX_STEPS, METHODS, WITHOUT, Method
from benchmarks.policies_data import MT10
from fleet.seeds import CLAIMS

GATE = {"expert": "metaworld", "gate_distance": 0.5, "window": 5, "keep": "episode"}
IMPERFECT = "benchmarks.learning_experts:ImperfectExpert"
NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much is done of everything, the same for all methods.

    Args:
        start_steps: Updates of the start policy.
        steps: Updates after it.
        env_steps: Steps of the robot, spread evenly over these.
        episodes: Held-out starts a task that the first and the last release are tested on.
        curve: Releases between them that are tested too, evenly spread, ...
        curve_episodes: ... on so many starts a task.
        publish_every: Updates between releases.
        first_start: Number of the first held-out start.
    """

    start_steps: int = 1500
    steps: int = 2000
    env_steps: int = 3000
    episodes: int = 50
    curve: int = 4
    curve_episodes: int = 15
    publish_every: int = 100
    first_start: int = CLAIMS


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One question.

    Args:
        question: What it asks.
        tasks: Of the run: demonstrated, and tested.
        robot_tasks: Those that the robot works on; () is all.
        demonstrations: Successful ones a task.
        expert: Of the demonstrations.
        operator: Settings of who may take over from the robot.
        helped: Names of the methods that have this operator.
        methods: Names of the methods that are compared.
        adapter, robot: Of the run file.
        control: The method that others are compared with.
        claim: Whether methods that learn from values are to beat it.
    """

    name: str
    question: str
    tasks: Mapping[str, str]
    robot_tasks: tuple[str, ...]
    demonstrations: int
    expert: str
    operator: Mapping[str, Any]
    helped: tuple[str, ...]
    methods: tuple[str, ...]
    adapter: str = "metaworld"
    robot: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"max_steps": MAX_STEPS})
    control: str = "no new data"
    claim: bool = False

    def start_tables(self, method: Method, counts: Counts, seed: int) -> dict[str, dict[str, Any]]:
        """Run file of the start: the expert demonstrates, then the first ``start_steps`` updates."""
        tables = self.tables(method, counts, seed)
        tables["learner"] |= {"steps": counts.start_steps}
        tables["operator"] = {"adapter": "scripted", "settings": {"expert": self.expert, "mode": "demonstrate"}}
        tables["actor"] |= {"tasks": list(self.tasks), "demonstrate": True, "sample": False}
        return tables

    def tables(self, method: Method, counts: Counts, seed: int) -> dict[str, dict[str, Any]]:
        """Run file of one method."""
        operator: dict[str, Any] = {"adapter": "none"}
        if method.operator and method.name in self.helped:
            operator = {"adapter": "scripted", "settings": {**self.operator, "seed": seed}}
        start = {"name": "bc", "config": {**CLONING, "seed": seed}} if method.start else {"name": ""}
        config = {key: value(counts) if callable(value) else value for key, value in method.config.items()}
        learner = {
            "steps": counts.start_steps + counts.steps,
            "start_steps": counts.start_steps,
            "seed": seed,
            "device": "cpu",
            "metrics_port": -1,
            "publish_every": counts.publish_every,
            "checkpoint_every": NEVER,
            "keep_releases": 0,
            "min_size_to_sample": 1,
        }
        return {
            "run": {"tasks": dict(self.tasks)},
            "robot": {"adapter": self.adapter, "settings": dict(self.robot)},
            "operator": operator,
            "actor": {"execute": 4, "seed": seed, "realtime": False, "tasks": list(self.robot_tasks), **method.actor},
            "learner": learner,
            "policy": {"family": method.policy["family"], "config": dict(method.policy["config"])},
            "start": start,
            "algorithm": {"name": method.algorithm, "config": {"batch_size": BATCH, **config, "seed": seed}},
        }


def _tasks(*names: str) -> dict[str, str]:
    return {name: MT10[name] for name in names}


WEAK = ("push-v3", "pick-place-v3", "door-open-v3")
OTHERS = ("drawer-open-v3", "window-open-v3", "button-press-topdown-v3")
ALL = tuple(method.name for method in METHODS)
WITH_OPERATOR = tuple(name for name, method in EVERY.items() if method.operator and method.collect != "never")
SCENARIOS = {
    "weak": Scenario(
        "weak",
        "three tasks, two demonstrations each, an operator who helps everybody",
        _tasks(*WEAK),
        (),
        2,
        "metaworld",
        GATE,
        WITH_OPERATOR,
        ALL,
    ),
    "imperfect": Scenario(
        "imperfect",
        "slow and unsteady demonstrations, reward at success only; the imitators' operator is as imperfect, others have none",
        _tasks("button-press-topdown-v3", "drawer-open-v3", "door-open-v3"),
        (),
        8,
        IMPERFECT,
        {**GATE, "expert": IMPERFECT, "gate_distance": 0.8},  # its own error is up to half of that
        ("hg_dagger",),
        ("bc", "no new data", "hg_dagger", "recap, offline", "recap, online", "co_rft", "q_chunking", "iql", "rlpd"),
        control="hg_dagger",
        claim=True,
    ),
    "retention": Scenario(
        "retention",
        "six tasks known, the robot works on three: what becomes of the others",
        _tasks(*WEAK, *OTHERS),
        WEAK,
        4,
        "metaworld",
        GATE,
        WITH_OPERATOR,
        ("bc", "no new data", "hg_dagger", "recap, online", *(method.name for method in WITHOUT)),
    ),
}
