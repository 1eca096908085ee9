"""What the benchmark of learning compares: each method as a run file would say it.

All begin with the same start policy, cloned from the demonstrations (``rlpd``: of its own family), see the same number of
environment steps and make the same number of learner steps. They differ in what they make of the data, and where that is
part of the method, in how it is collected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

HORIZON = 8
SMALL = {"width": 64, "num_layers": 2, "num_steps": 5, "horizon": HORIZON}
FLOW = {"family": "flow", "config": SMALL}
JUDGED = {"family": "flow", "config": {**SMALL, "advantage": True}}  # takes the condition "advantage"
SQUASHED = {"family": "squashed", "config": {"horizon": HORIZON}}
BATCH = 64
CLONING = {"batch_size": BATCH, "learning_rate": 1e-3, "ema_decay": 0.995}
NETWORK = {"width": 256, "num_layers": 3}  # of critics and values
MAX_STEPS = 200  # the robot's time limit


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        what: In a sentence.
        algorithm, config: ``algorithm`` of the run file, but for its seed and batch size. A function is asked for its value
            with ``learning_scenarios.Counts``.
        policy: Table of the run file.
        start: Algorithm that makes the start policy; "" is the method's own.
        collect: When the robot works: "online" between the updates with the newest release, "first" all at once with the
            start policy, "never".
        operator: Whether an operator's help is part of it, where the scenario has one.
        demonstrations: Whether they stay in the log after the start.
        actor: Of the run file.
    """

    name: str
    what: str
    algorithm: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    policy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: FLOW)
    start: str = "bc"
    collect: str = "online"
    operator: bool = True
    demonstrations: bool = True
    actor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> bool:
        """Whether it learns what actions are worth."""
        return self.algorithm in ("recap", "chunked_rl", "rlpd")

    @property
    def start_key(self) -> str:
        """Methods with the same one share a start."""
        wide = "-advantage" if self.policy["config"].get("advantage") else ""
        return f"{self.start or self.algorithm}-{self.policy['family']}{wide}"


AVERAGE = {"ema_decay": 0.995}
IMITATION = {**AVERAGE, "learning_rate": 5e-4, "start_steps": 0}
OWN = {"autonomous": "successful"}
# The start is the paper's fine-tuning: demonstrations are positive, the value learns from them.
RECAP = {
    **AVERAGE,
    "learning_rate": 5e-4,
    "episode_steps": MAX_STEPS,
    "value_start_steps": lambda counts: counts.start_steps,
    "value": NETWORK,
}
CHUNKED = {**AVERAGE, "learning_rate": 5e-4, "reward": "success", "discount": 0.99, "critic": NETWORK}
FEW = {"num_samples": 16, "target_samples": 4}  # the flow is drawn 4 times for each row of a batch: most of an update's time

METHODS = (
    Method("bc", "the start policy", "bc", CLONING, collect="never"),
    Method("no new data", "the same updates on the demonstrations alone", "bc", CLONING, collect="never"),
    Method("hg_dagger", "imitates demonstrations and corrections, half and half", "hg_dagger", IMITATION),
    Method("hg_dagger, adaptive", "SOP's mixture by losses", "hg_dagger", {**IMITATION, "mixture": "adaptive"}),
    Method("hg_dagger, autonomous", "its own successes too", "hg_dagger", {**IMITATION, **OWN}),
    Method(
        "hg_dagger, sirius", "its own successes too, Sirius' weights", "hg_dagger", {**IMITATION, **OWN, "weighting": "sirius"}
    ),
    Method(
        "hg_dagger, iwr", "its own successes too, corrections one half", "hg_dagger", {**IMITATION, **OWN, "weighting": "iwr"}
    ),
    Method(
        "recap, offline",
        "all data of the start policy; the value is frozen after the first fifth of the updates on it",
        "recap",
        {**RECAP, "online_value": False, "value_start_steps": lambda counts: counts.start_steps + counts.steps // 5},
        JUDGED,
        start="",
        collect="first",
    ),
    Method("recap, online", "value and labels refreshed while data comes", "recap", RECAP, JUDGED, start=""),
    Method(
        "co_rft",
        "Cal-QL on chunks, TD3 actor with a behaviour term",
        "chunked_rl",
        {**CHUNKED, "method": "cal_ql", "prefix_stride": HORIZON // 2},
    ),
    Method(
        "q_chunking",
        "the best of several chunks of the cloned flow",
        "chunked_rl",
        {**CHUNKED, **FEW, "method": "q_chunking"},
        actor={"sample": True},
    ),
    Method(
        "iql",
        "advantage-weighted imitation",
        "chunked_rl",
        {**CHUNKED, "method": "iql", "value": NETWORK},
        actor={"sample": True},
    ),
    Method(
        "rlpd",
        "soft actor-critic on chunks, half demonstrations; a behaviour term keeps the start",
        "rlpd",
        {**AVERAGE, "reward": "success", "discount": 0.99, "num_critics": 5, "bc_alpha": 0.1, "critic_steps": 200},
        SQUASHED,
        actor={"sample": True},
    ),
)
# Of the scenario "retention": both forget, or not, what only the demonstrations show.
WITHOUT = tuple(
    dataclasses.replace(method, name=f"{method.name}, demonstrations gone", demonstrations=False)
    for method in METHODS
    if method.name in ("hg_dagger", "recap, online")
)
EVERY = {method.name: method for method in (*METHODS, *WITHOUT)}
