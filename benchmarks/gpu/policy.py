"""A transformer policy of any size: image patches, state and instruction as tokens, one learned query for each action.

All tokens see each other. The blocks are those of a pre-norm transformer without biases in the attention.

Shape suffixes: B batch, N tokens, F width, H chunk length, A action dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.policies.base import INSTRUCTION, Chunk, PolicySpec

PATCH = 14


@dataclasses.dataclass
class TransformerConfig:
    width: int
    num_layers: int
    num_heads: int
    image_size: int = 224
    cameras: tuple[str, ...] = ("observation.images.front", "observation.images.wrist")
    state_dim: int = 39
    instruction_dim: int = 32
    action_dim: int = 7
    horizon: int = 16

    @property
    def num_tokens(self) -> int:
        return len(self.cameras) * (self.image_size // PATCH) ** 2 + 2 + self.horizon


class Block(nn.Module):
    """Attention and a layer of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.before_attention, self.before_layer = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BNF: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x_BNF)).unflatten(-1, (3, self._num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BNF = x_BNF + self.out(attended)
        return x_BNF + self.down(functional.gelu(self.up(self.before_layer(x_BNF))))


class TransformerPolicy(nn.Module):
    """Implements ``algorithms.policies.base.Policy`` without a density."""

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size, width = config.image_size, config.width
        reads: dict[str, tuple[int, ...]] = {name: (size, size, 3) for name in config.cameras}
        reads["observation.state"] = (config.state_dim,)
        self.spec = PolicySpec(reads, {INSTRUCTION: (config.instruction_dim,)}, config.action_dim, config.horizon)
        self._cameras = config.cameras
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.state, self.instruction = nn.Linear(config.state_dim, width), nn.Linear(config.instruction_dim, width)
        self.place_NF = nn.Parameter(torch.randn(config.num_tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.action_dim)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> None:
        return None

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        return Chunk(self.head(self.embed(obs)))

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): L1 distance, averaged over A and the valid actions."""
        error_BH = (self.act(obs).actions_BHA.float() - chunk.actions_BHA).abs().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, H, F): what stands at the actions' queries."""
        dtype = self.patches.weight.dtype
        tokens = [self.patches(obs[name].permute(0, 3, 1, 2).to(dtype) / 255 - 0.5).flatten(2).mT for name in self._cameras]
        tokens.append(self.state(obs["observation.state"].to(dtype))[:, None])
        tokens.append(self.instruction(obs[INSTRUCTION].to(dtype))[:, None])
        known = torch.cat(tokens, 1)
        queries = known.new_zeros(len(known), self.spec.horizon, known.shape[-1])
        x_BNF = torch.cat([known, queries], 1) + self.place_NF
        for block in self.blocks:
            x_BNF = block(x_BNF)
        out: Tensor = self.norm(x_BNF[:, -self.spec.horizon :])
        return out
