"""Pre-norm transformer blocks, as all token-based families use them.

Shape suffixes: B batch, N tokens, M tokens that are looked at, F width, C condition dims.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention of queries over a memory, or over themselves."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def memory(self, x_BMF: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, M, F / heads), to be used by several calls."""
        key, value = self.key_value(x_BMF).unflatten(-1, (2, self._num_heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(self, x_BNF: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """``mask``: broadcastable to (B, heads, N, M), True where a query may look."""
        query = self.query(x_BNF).unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(query, *memory, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to a memory (where ``cross``), and a layer of ``4 F`` units.

    Args:
        condition_dim: C > 0: each sublayer is scaled, shifted and gated by a condition, its gates zero at first (adaLN-Zero,
            DiT, arXiv 2212.09748 section 3.2).
    """

    def __init__(self, width: int, num_heads: int, *, cross: bool = False, condition_dim: int = 0) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.cross = Attention(width, num_heads) if cross else None
        self.layer = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        num = 3 if cross else 2
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=condition_dim == 0) for _ in range(num))
        self.modulation = nn.Linear(condition_dim, 3 * num * width) if condition_dim else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def ask(self, condition: Tensor) -> Tensor:
        """What a condition (B, C), or (B, N, C) by token, asks of the sublayers: to be used by several calls."""
        assert self.modulation is not None
        asked: Tensor = self.modulation(functional.silu(condition))
        return asked

    def forward(
        self,
        x_BNF: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            memory: ``self.cross.memory(tokens)``.
            mask: Of the self-attention, see ``Attention``.
            asked: ``self.ask(condition)``.
        """
        sublayers = [lambda y: self.attention(y, self.attention.memory(y), mask)]
        if self.cross is not None:
            assert memory is not None
            cross, known = self.cross, memory
            sublayers.append(lambda y: cross(y, known))
        sublayers.append(self.layer)
        parts: list[tuple[Tensor, ...]] = []
        if self.modulation is not None:
            assert asked is not None
            asked = asked[:, None] if asked.dim() == 2 else asked
            parts = list(zip(*[iter(asked.chunk(3 * len(sublayers), -1))] * 3, strict=True))
        for i, (norm, sublayer) in enumerate(zip(self.norms, sublayers, strict=True)):
            y = norm(x_BNF)
            if parts:
                scale, shift, gate = parts[i]
                x_BNF = x_BNF + gate * sublayer(y * (1 + scale) + shift)
            else:
                x_BNF = x_BNF + sublayer(y)
        return x_BNF


def sinusoid(position: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(..., width): sines and cosines of ``position`` (...) at ``width / 2`` frequencies from 1 to 1 / max_period."""
    half = width // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / max(half - 1, 1)
    angle = position.float()[..., None] * max_period**-exponent
    return torch.cat([angle.sin(), angle.cos()], -1)
