"""Critics: how good a chunk of actions is in a state. They judge for ``algorithms/policies/best_of.py`` and are published with
the policy that they judge for.

    critic(obs, actions_BHA) -> values_KB        K critics of an ensemble, each of which sees all rows

Shape suffixes: B batch, H chunk length, A action dims, K critics, F hidden width, S input dims.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.policies.base import INSTRUCTION, PolicySpec
from algorithms.policies.normalise import ActionScale, Normaliser
from algorithms.policies.statistics import Statistics
from algorithms.policies.vision import make_vision
from fleet.errors import PolicyError
from fleet.lookup import check_settings, resolve

CRITICS = {"mlp": "algorithms.critics:ChunkCritic"}


@dataclasses.dataclass
class ChunkCriticConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes."""
    action_dim: int
    """A."""
    horizon: int
    """H, actions of a chunk that are judged together."""
    instruction_dim: int = 32
    """Size of obs["instruction"]; 0 for one task."""
    num_critics: int = 2
    """K."""
    width: int = 512
    """F, units of each hidden layer."""
    num_layers: int = 4
    """Hidden layers."""
    vision: str = "cnn"
    """How cameras are seen, see ``algorithms.policies.vision``; one for all K."""
    image_dims: int = 64
    """Features of each camera's image."""


class ChunkCritic(nn.Module):
    """K networks with LayerNorm over the state and the whole chunk (Q-chunking, arXiv 2507.07969; the LayerNorm is RLPD's,
    arXiv 2302.02948)."""

    Config = ChunkCriticConfig

    def __init__(self, config: ChunkCriticConfig) -> None:
        super().__init__()
        sizes = (config.action_dim, config.horizon, config.num_critics, config.width, config.num_layers)
        if min(sizes) < 1 or config.instruction_dim < 0:
            raise PolicyError(f"a critic of {config}", rule="sizes are at least 1, instruction_dim at least 0")
        reads = {name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())}
        conditions = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
        self.spec = PolicySpec(reads, conditions, config.action_dim, config.horizon)
        self.normaliser, self.scale = Normaliser(self.spec.vectors), ActionScale(config.action_dim)
        self.cameras = nn.ModuleList(make_vision(config.vision, s, config.image_dims) for s in self.spec.images.values())
        size = self.normaliser.size + config.instruction_dim + len(self.cameras) * config.image_dims
        size += config.horizon * config.action_dim
        widths = [size] + [config.width] * config.num_layers
        self.layers = nn.ModuleList(
            _Ensemble(config.num_critics, num_in, num_out) for num_in, num_out in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.num_layers))
        self.head = _Ensemble(config.num_critics, config.width, 1)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one is missing, of another shape, or not finite."""
        self.normaliser.set_statistics(statistics)
        self.scale.set_statistics(statistics)

    def forward(self, obs: Mapping[str, Tensor], actions_BHA: Tensor) -> Tensor:
        """Values (K, B) in float32. Actions in the robot's units."""
        parts = [self.normaliser(obs), self.scale.normalise(actions_BHA).flatten(1)]
        if self.spec.conditions:
            parts.append(obs[INSTRUCTION] * math.sqrt(obs[INSTRUCTION].shape[1]))
        parts += [camera(obs[name]).mean(1) for name, camera in zip(self.spec.images, self.cameras, strict=True)]
        x_KBS = torch.cat(parts, 1)[None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x_KBS = functional.relu(norm(layer(x_KBS)))
        values: Tensor = self.head(x_KBS)[..., 0]
        return values.float()


class _Ensemble(nn.Module):
    """K linear layers in one matrix product: (1 or K, B, in) -> (K, B, out)."""

    def __init__(self, num: int, num_in: int, num_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(num_in)  # as nn.Linear begins
        self.weight = nn.Parameter(torch.empty(num, num_in, num_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, num_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


def build_critic(family: str, config: Mapping[str, Any]) -> Any:
    """A critic with fresh weights, which keeps both as ``critic.family`` and ``critic.config``, as policies do.

    Raises:
        PolicyError: Unknown family or field, a missing field, or a value out of its range.
    """
    cls = resolve(CRITICS, family, kind="critic", error=PolicyError)
    check_settings(cls.Config, config, kind=f"critic {family!r}", error=PolicyError)
    critic = cls(cls.Config(**config))
    critic.family, critic.config = family, dict(config)
    return critic
