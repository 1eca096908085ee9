"""Which families the benchmark trains, with which settings: what a run file would say in ``policy`` and ``algorithm``.

Budgets are of one order of magnitude in updates; what a family needs otherwise is stated here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

HORIZON = 8
IMAGE_TASK, CAMERA, STATE = "button-press-topdown-v3", "observation.images.corner2", "observation.state"
STATE_READS = {STATE: [39]}
IMAGE_READS = {CAMERA: [84, 84, 3], STATE: [39]}
GRIPPER = {STATE: [0, 1, 2, 3]}  # its place and opening


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: In the table.
        family: Of the registry.
        config: ``policy.config`` but for the horizon.
        algorithm: ``algorithm.config`` of behaviour cloning.
        steps: Updates.
    """

    name: str
    family: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    algorithm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 3000

    def settings(self, seed: int) -> dict[str, dict[str, Any]]:
        """The learner's tables; the newest weights are published once, at the end."""
        never = 10**9
        learner = {"steps": self.steps, "start_steps": 0, "seed": seed, "device": "cpu", "metrics_port": -1}
        return {
            "learner": {**learner, "min_size_to_sample": 1, "publish_every": never, "checkpoint_every": never},
            "policy": {"family": self.family, "config": {"horizon": HORIZON, **self.config}},
            "algorithm": {"name": "bc", "config": {"seed": seed, **self.algorithm}},
        }


TRANSFORMER = {"learning_rate": 1e-3, "batch_size": 128}
STATE_CASES = (Case("mlp", "mlp", steps=4000),)
IMAGE_CASES: tuple[Case, ...] = ()
