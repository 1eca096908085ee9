"""Which families the benchmark trains, with which settings: what a run file would say in ``policy`` and ``algorithm``.

Budgets are minutes of one core each. What a family needs otherwise than the others is stated here and nowhere else.
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
        batch_size, learning_rate, ema_decay: Of behaviour cloning.
        steps: Updates.
    """

    name: str
    family: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.995
    steps: int = 4000

    def settings(self, seed: int) -> dict[str, dict[str, Any]]:
        """The learner's tables; the newest weights are published once, at the end."""
        never = 10**9
        learner = {"steps": self.steps, "start_steps": 0, "seed": seed, "device": "cpu", "metrics_port": -1}
        algorithm = {
            "seed": seed,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "ema_decay": self.ema_decay,
        }
        return {
            "learner": {**learner, "min_size_to_sample": 1, "publish_every": never, "checkpoint_every": never},
            "policy": {"family": self.family, "config": {"horizon": HORIZON, **self.config}},
            "algorithm": {"name": "bc", "config": algorithm},
        }

    def shortened(self, share: float) -> Case:
        """With this share of the updates."""
        return dataclasses.replace(self, steps=max(2, int(self.steps * share)))


GRIPPER_AND_CAMERA = {"reads": list(IMAGE_READS), "select": GRIPPER}

LONG = 0.998  # average of transformers, whose losses draw noise
# Ten demonstrations leave most of many levels unseen: with 127 levels and no blur `token, parallel` came to 78 % of 200 starts
# after 4,000 updates; with these to 88 % of 100 other ones after 2,000.
FEW_LEVELS = {"num_bins": 31, "blur": 0.75}
STATE_CASES = (
    Case("mlp", "mlp", batch_size=256),
    Case("flow", "flow", ema_decay=LONG),
    Case("token, parallel", "token", {"decoding": "parallel", **FEW_LEVELS, "soft_decode": True}, ema_decay=LONG, steps=2000),
    Case("token, autoregressive", "token", {"decoding": "autoregressive", **FEW_LEVELS}, ema_decay=LONG, steps=2000),
    Case(
        "token, autoregressive, dct",
        "token",
        {"decoding": "autoregressive", "codec": "dct", "blur": 0.75},
        ema_decay=LONG,
        steps=2000,
    ),
    Case("token, diffusion", "token", {"decoding": "diffusion", **FEW_LEVELS}, ema_decay=LONG, steps=2000),
)
CONTROL_CASES = (  # of the part "control": the first of these with other losses
    Case("mlp, absolute error", "mlp", batch_size=256),
    Case("mlp, squared error", "benchmarks.policies_control:SquaredMlp", batch_size=256),
    Case("mlp, 31 levels, cross-entropy", "benchmarks.policies_control:LevelsMlp", batch_size=256),
)
IMAGE_CASES = (
    Case("cnn", "cnn", GRIPPER_AND_CAMERA, batch_size=64, steps=1500),
    Case("small_vla", "small_vla", GRIPPER_AND_CAMERA, batch_size=32, learning_rate=5e-4, steps=1000),
    Case("token with images", "token", {**GRIPPER_AND_CAMERA, **FEW_LEVELS, "soft_decode": True}, batch_size=32, steps=1500),
)

CHUNK_TASKS = ("push-v3", "door-open-v3")
CHUNK_CASES = (  # of the part "latency": chunks long enough for what comes late
    Case("flow", "flow", {"horizon": 16}, ema_decay=LONG, steps=2000),
    Case("flow trained for delays", "flow", {"horizon": 16, "max_delay": 4}, ema_decay=LONG, steps=2000),
)
