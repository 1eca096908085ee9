"""A policy of 25 M parameters that sees two cameras: few operations for each parameter, so that its updates are short and
data has little time to come.

Each camera goes through the same four strided convolutions; their features, the state and the instruction through two
layers; most parameters lie in the first of them.

Shape suffixes: B batch, H chunk length, A action dims, F features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import INSTRUCTION, Chunk, PolicySpec


@dataclasses.dataclass
class ImageConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features with their shapes; those of three dimensions are images (height, width, 3) of one size."""
    action_dim: int
    horizon: int = 16
    instruction_dim: int = 32
    width: int = 1472
    """F of the two layers."""
    channels: tuple[int, ...] = (32, 64, 128, 128)


class ImagePolicy(nn.Module):
    """Implements ``algorithms.policies.base.Policy`` without a density."""

    Config = ImageConfig

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        reads = {name: tuple(shape) for name, shape in sorted(config.reads.items())}
        self.spec = PolicySpec(reads, {INSTRUCTION: (config.instruction_dim,)}, config.action_dim, config.horizon)
        self._cameras = [name for name, shape in reads.items() if len(shape) == 3]
        self._vectors = [name for name in reads if name not in self._cameras]
        layers: list[nn.Module] = []
        for num_in, num_out in zip((3, *config.channels), config.channels, strict=False):
            layers += [nn.Conv2d(num_in, num_out, 3, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        height, width, _ = reads[self._cameras[0]]
        of_camera = config.channels[-1] * (height >> len(config.channels)) * (width >> len(config.channels))
        of_vectors = sum(math.prod(reads[name]) for name in self._vectors) + config.instruction_dim
        num_in = of_camera * len(self._cameras) + of_vectors
        self.trunk = nn.Sequential(
            nn.Linear(num_in, config.width), nn.LayerNorm(config.width), nn.ReLU(), nn.Linear(config.width, 512), nn.ReLU()
        )
        self.head = nn.Linear(512, config.horizon * config.action_dim)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> None:
        return None

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        return Chunk(self.head(self.embed(obs)).unflatten(1, (self.spec.horizon, self.spec.action_dim)))

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): L1 distance, averaged over A and the valid actions."""
        error_BH = (self.act(obs).actions_BHA - chunk.actions_BHA).abs().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, 512)."""
        dtype = self.head.weight.dtype
        images = [self.encoder(obs[name].permute(0, 3, 1, 2).to(dtype) / 255 - 0.5) for name in self._cameras]
        vectors = [obs[name].flatten(1).to(dtype) for name in self._vectors]
        hidden_BF: Tensor = self.trunk(torch.cat([*images, *vectors, obs[INSTRUCTION].to(dtype)], 1))
        return hidden_BF
