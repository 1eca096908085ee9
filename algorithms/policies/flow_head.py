"""The network of a flow policy: tokens of the actions, noisy, look at each other and at those of the observation.

Shape suffixes: B batch, H chunk length, A action dims, N tokens of the observation, F width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.policies.transformer import Attention, Block, sinusoid

_TIME_SCALE = 100.0  # radians that the fastest sinusoid of the time turns between noise and data

Memory = list[tuple[Tensor, Tensor]]


class FlowHead(nn.Module):
    """(x_BHA, time) -> velocity_BHA, given the observation. Time conditions every layer (adaLN-Zero)."""

    def __init__(self, horizon: int, action_dim: int, width: int, num_layers: int, num_heads: int, *, spread: bool) -> None:
        """
        Args:
            spread: Whether there is a second output, of the actions' shape, for a learnt noise.
        """
        super().__init__()
        self._width = width
        self.into = nn.Linear(action_dim, width)
        self.place_HF = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        blocks = [Block(width, num_heads, cross=True, condition_dim=width) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, action_dim)
        self.spread = nn.Linear(width, action_dim) if spread else None
        for zero in (self.modulation.weight, self.modulation.bias, self.out.bias):
            nn.init.zeros_(zero)

    def memory(self, tokens_BNF: Tensor) -> Memory:
        """Keys and values of the observation, by block: computed once, used at every step."""
        crosses = (cast(Attention, block.cross) for block in self.blocks)
        return [cross.memory(tokens_BNF) for cross in crosses]

    def forward(
        self, x_BHA: Tensor, time: Tensor, memory: Memory, given_BF: Tensor | None = None, seen_BH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            time: (B,), or (B, H) by action, in [0, 1].
            given_BF: A condition beside the time.
            seen_BH: bool, actions that others may look at, at least one in each row; None: all.

        Returns:
            The velocity, and the second output (None without ``spread``), both float32.
        """
        dtype = self.into.weight.dtype
        condition = self.time(sinusoid(_TIME_SCALE * time, self._width).to(dtype))
        if given_BF is not None:
            condition = condition + (given_BF if time.dim() == 1 else given_BF[:, None])
        mask = None if seen_BH is None else seen_BH[:, None, None, :]
        y_BHF = self.into(x_BHA.to(dtype)) + self.place_HF
        for block, known in zip(self.blocks, memory, strict=True):
            y_BHF = block(y_BHF, known, mask=mask, condition=condition)
        scale, shift = self.modulation(functional.silu(condition)).chunk(2, -1)
        if time.dim() == 1:
            scale, shift = scale[:, None], shift[:, None]
        y_BHF = self.norm(y_BHF) * (1 + scale) + shift
        return self.out(y_BHF).float(), None if self.spread is None else self.spread(y_BHF).float()
