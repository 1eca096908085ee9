"""The Policy contract (see docs/policies.md). Every family in this folder implements it.

Shape suffixes: B batch, H chunk length, A action dims, T decisions of a chunk, S state dims, E embedding dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fleet.errors import PolicyError
from fleet.spec import ACTION, RobotSpec

INSTRUCTION = "instruction"  # the condition (B, E): embedding of the task's instruction


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """What a policy reads and writes.

    Args:
        reads: Observation features, by LeRobot's names, with their shapes.
        conditions: Other entries of ``obs`` that it needs, with their shapes, for example ``{"instruction": (16,)}``.
        action_dim: A.
        horizon: H, actions in a chunk.
        replay: Extra columns of the chunks table that its log_prob needs.
    """

    reads: Mapping[str, tuple[int, ...]]
    conditions: Mapping[str, tuple[int, ...]]
    action_dim: int
    horizon: int
    replay: tuple[str, ...] = ()

    def check_robot(self, spec: RobotSpec) -> None:
        """Raises PolicyError, naming both sides, when this policy cannot drive that robot."""
        for name, shape in self.reads.items():
            feature = spec.features.get(name)
            if feature is None or feature.shape != tuple(shape):
                raise PolicyError(
                    f"robot type {spec.robot_type!r} has {name!r} = {feature and feature.shape}",
                    rule=f"the policy reads {name!r} of shape {tuple(shape)}",
                    remedy=f"start a run for this robot type, or give the robot this feature; it has {sorted(spec.features)}",
                )
        if spec.features[ACTION].shape != (self.action_dim,):
            raise PolicyError(
                f"robot type {spec.robot_type!r} takes actions of shape {spec.features[ACTION].shape}",
                rule=f"the policy writes actions of shape ({self.action_dim},)",
            )


@dataclasses.dataclass
class Chunk:
    """What ``act`` returns: actions_BHA in the robot's units, log_prob_BT or None, replay columns by name."""

    actions_BHA: Tensor
    log_prob_BT: Tensor | None = None
    replay: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Policy(Protocol):
    """A torch module with these methods. ``obs`` maps feature and condition names to (B, ...) tensors."""

    spec: PolicySpec

    def noise(self, batch_size: int, generator: torch.Generator | None) -> Any:
        """Whatever randomness act and the loss need; None where there is none."""
        ...

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """noise=None: deterministic."""
        ...

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, T). Raises PolicyError if the family has no density."""
        ...

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): mean over the valid actions of each sample."""
        ...

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): features for value functions, failure detection, pseudo-counts."""
        ...
