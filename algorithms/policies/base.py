"""The Policy contract (see docs/policies.md). Every family in this folder implements it.

Shape suffixes: B batch, H chunk length, A action dims, T decisions of a chunk, D actions of a prefix, E embedding dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from algorithms.policies.statistics import Statistics
from algorithms.policies.text import text_of
from fleet.errors import PolicyError
from fleet.spec import ACTION, IMAGE_PREFIX, RobotSpec

# Entries of ``obs`` beside the robot's features. The first three are conditions, which a spec declares.
INSTRUCTION = "instruction"  # (B, E): embedding of the task's instruction
TEXT = "instruction_text"  # (B, text.NUM_BYTES), uint8: the instruction itself, see text.py
ADVANTAGE = "advantage"  # (B,): 1 positive, -1 negative, 0 absent; a missing entry is absent for all
PREFIX = "action_prefix"  # (B, D, A), robot's units: actions of the chunk's first steps that are decided already
DELAY = "delay"  # (B,), int64: how many of them count, at most spec.max_delay; a missing entry is 0


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """What a policy reads and writes.

    Args:
        reads: Observation features, by LeRobot's names, with their shapes.
        conditions: Other entries of ``obs`` that it needs, with their shapes, for example ``{"instruction": (16,)}``.
        action_dim: A.
        horizon: H, actions in a chunk.
        replay: Extra columns of the chunks table, ``replay.*``, that its log_prob needs, with their shapes.
        density: Whether ``act`` with noise gives log_prob_BT, and ``log_prob`` computes it.
        max_delay: Actions of a prefix that ``act`` can continue (training-time RTC); 0: it takes no prefix.
    """

    reads: Mapping[str, tuple[int, ...]]
    conditions: Mapping[str, tuple[int, ...]]
    action_dim: int
    horizon: int
    replay: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    density: bool = False
    max_delay: int = 0

    @property
    def images(self) -> dict[str, tuple[int, ...]]:
        """The cameras among ``reads``: uint8 (height, width, channels)."""
        return {name: shape for name, shape in self.reads.items() if name.startswith(IMAGE_PREFIX)}

    @property
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """All other features among ``reads``; these are normalised."""
        return {name: shape for name, shape in self.reads.items() if not name.startswith(IMAGE_PREFIX)}

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
    """A torch module with these methods. ``obs`` maps names of features and conditions to (B, ...) tensors; images are uint8
    (B, height, width, channels). Rows do not depend on each other.

    Optional: ``frozen``, names of child modules that are never trained, nor published: whoever builds the policy has them.
    ``check(config)``, static: raises PolicyError where a setting is out of its range, which is known before the robots are.
    """

    spec: PolicySpec

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Sets the normalisation, of all ``spec.vectors`` and of "action". It lies in buffers and travels with the weights.

        Raises:
            PolicyError: A feature is missing, of another size, or not finite.
        """
        ...

    def noise(self, batch_size: int, generator: torch.Generator | None) -> Any:
        """Whatever randomness act and the loss need, by name, each (B, ...) on the CPU; None where there is none. Rows are
        independent draws: a part of them serves a part of the batch."""
        ...

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """A chunk for each row. With ``noise`` a sample, with its log_prob_BT where there is a density; noise=None:
        deterministic, what is deployed.

        Args:
            guidance: Classifier-free, of the condition "advantage": 0 leaves it out, 1 takes it as given.
        """
        ...

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, T), by decision (token, step, or step of a transition), in float32, differentiable: of what ``act`` returned for
        these obs. Equal to its log_prob_BT to the bit for the same weights, rows and device.

        Raises:
            PolicyError: The family has no density, or a replay column is missing.
        """
        ...

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """(B, T): which decisions belong to the steps of ``mask_BH`` (executed ones, say). Others are padding."""
        ...

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): mean over the valid actions of each sample, 0 where none is valid. Masked actions may be anything, NaN too.

        Args:
            noise: Of ``noise``; None where no augmentation is wanted and the family's loss needs no randomness.
        """
        ...

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): features for value functions, failure detection, pseudo-counts."""
        ...


def acting_conditions(spec: PolicySpec, embedding: Tensor, instruction: str = "") -> dict[str, Tensor]:
    """The conditions of a policy that is to do its best: the task's instruction, positive advantage.

    Args:
        embedding: (E,), or (B, E).
        instruction: Its text, of all rows; used where the policy reads it.

    Raises:
        PolicyError: The policy was made for embeddings of another size, or the text is missing or too long.
    """
    rows = embedding.reshape(-1, embedding.shape[-1])
    conditions: dict[str, Tensor] = {}
    if INSTRUCTION in spec.conditions:
        if (rows.shape[1],) != tuple(spec.conditions[INSTRUCTION]):
            raise PolicyError(
                f"the task's instruction has an embedding of {rows.shape[1]} elements",
                rule=f"the policy reads 'instruction' of shape {tuple(spec.conditions[INSTRUCTION])}",
                remedy="use the instruction encoder that the policy was trained with",
            )
        conditions[INSTRUCTION] = rows
    if TEXT in spec.conditions:
        conditions[TEXT] = text_of(instruction).to(rows.device).expand(len(rows), -1)
    if ADVANTAGE in spec.conditions:
        conditions[ADVANTAGE] = torch.ones(len(rows), device=rows.device)
    return conditions
