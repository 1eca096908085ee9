"""Critics: how good a chunk of actions is in a state. They judge for ``algorithms/policies/best_of.py`` and are published with
the policy that they judge for.

    critic(obs, actions_BHA) -> values_KB        K critics of an ensemble, each of which sees all rows

Where several chunks are judged in each state, ``obs`` has fewer rows: B / N, each for N actions in turn.

Shape suffixes: B batch, N chunks a state, H chunk length, A action dims, K critics, F hidden width, S input dims.
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
from algorithms.policies.vision import Cameras
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
    vision_width: int = 64
    """Width of an image's tokens."""
    image_dims: int = 64
    """Features that are made of all tokens of one camera."""


class ChunkCritic(nn.Module):
    """K networks with LayerNorm over the state and the whole chunk (Q-chunking, arXiv 2507.07969; the LayerNorm is RLPD's,
    arXiv 2302.02948)."""

    Config = ChunkCriticConfig

    def __init__(self, config: ChunkCriticConfig) -> None:
        super().__init__()
        chunk, image = (config.action_dim, config.horizon), (config.vision_width, config.image_dims)
        if min(*chunk, *image, config.num_critics, config.width, config.num_layers) < 1 or config.instruction_dim < 0:
            raise PolicyError(f"a critic of {config}", rule="sizes are at least 1, instruction_dim at least 0")
        reads = {name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())}
        conditions = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
        self.spec = PolicySpec(reads, conditions, config.action_dim, config.horizon)
        self.normaliser, self.scale = Normaliser(self.spec.vectors), ActionScale(config.action_dim)
        self.cameras = Cameras(self.spec.images, config.vision, config.vision_width, shift_pixels=0)
        self.summaries = self.cameras.summaries(config.image_dims)
        size = self.normaliser.size + config.instruction_dim + len(self.spec.images) * config.image_dims
        widths = [size + config.horizon * config.action_dim] + [config.width] * config.num_layers
        self.layers = nn.ModuleList(
            _Ensemble(config.num_critics, num_in, num_out) for num_in, num_out in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(_Norm(config.num_critics, config.width) for _ in range(config.num_layers))
        self.head = _Ensemble(config.num_critics, config.width, 1)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one is missing, of another shape, or not finite."""
        self.normaliser.set_statistics(statistics)
        self.scale.set_statistics(statistics)

    def forward(self, obs: Mapping[str, Tensor], actions_BHA: Tensor) -> Tensor:
        """Values (K, B) in float32. Actions in the robot's units.

        Raises:
            PolicyError: A feature is missing, or has another shape.
        """
        parts = [self.normaliser(obs)]
        if self.spec.conditions:
            parts.append(obs[INSTRUCTION] * math.sqrt(obs[INSTRUCTION].shape[1]))
        parts += [summary(tokens) for summary, tokens in zip(self.summaries, self.cameras(obs), strict=True)]
        state_BS = torch.cat(parts, 1)
        state_BS = state_BS.repeat_interleave(len(actions_BHA) // len(state_BS), 0)
        x_KBS = torch.cat([state_BS, self.scale.normalise(actions_BHA).flatten(1)], 1)[None]
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


class _Norm(nn.Module):
    """LayerNorm of K critics: (K, B, F) -> (K, B, F)."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num, 1, width)), nn.Parameter(torch.zeros(num, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


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
