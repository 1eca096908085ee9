"""The network of a flow policy: tokens of the actions, noisy, look at each other and at those of the observation.

Shape suffixes: B batch, H chunk length, A action dims, N tokens of the observation, F width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.policies.flow_sde import times
from algorithms.policies.transformer import Attention, Block, sinusoid

_TIME_SCALE = 100.0  # radians that the fastest sinusoid of the time turns between noise and data

Memory = list[tuple[Tensor, Tensor]]
Ask = Callable[[Tensor, Tensor], list[Tensor]]  # when_B, kind_B -> FlowHead.ask; kind: row of a table of conditions


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

    def ask(self, time: Tensor, given_BF: Tensor | None = None) -> list[Tensor]:
        """What the time, (B,) or (B, H) by action, in [0, 1], asks of each block and of the output.

        Args:
            given_BF: A condition beside the time.
        """
        condition = self.time(sinusoid(_TIME_SCALE * time, self._width).to(self.into.weight.dtype))
        if given_BF is not None:
            condition = condition + (given_BF if time.dim() == 1 else given_BF[:, None])
        return [*(cast(Block, block).ask(condition) for block in self.blocks), self.modulation(functional.silu(condition))]

    def forward(
        self, x_BHA: Tensor, asked: list[Tensor], memory: Memory, seen_BH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            asked: See ``ask``.
            seen_BH: bool, actions that others may look at, at least one in each row; None: all.

        Returns:
            The velocity, and the second output (None without ``spread``), both float32.
        """
        mask = None if seen_BH is None else seen_BH[:, None, None, :]
        y_BHF = self.into(x_BHA.to(self.into.weight.dtype)) + self.place_HF
        for block, known, wanted in zip(self.blocks, memory, asked[:-1], strict=True):
            y_BHF = block(y_BHF, known, mask=mask, asked=wanted)
        last = asked[-1] if asked[-1].dim() == 3 else asked[-1][:, None]
        scale, shift = last.chunk(2, -1)
        y_BHF = self.norm(y_BHF) * (1 + scale) + shift
        return self.out(y_BHF).float(), None if self.spread is None else self.spread(y_BHF).float()


def by_time(head: FlowHead, fixed_BH: Tensor | None, kinds: nn.Embedding | None) -> Ask:
    """Of any times.

    Args:
        fixed_BH: Actions whose time is 0, whatever is asked.
        kinds: Conditions beside the time.
    """

    def ask(time_B: Tensor, kind_B: Tensor) -> list[Tensor]:
        time = time_B if fixed_BH is None else time_B[:, None] * ~fixed_BH
        return head.ask(time, None if kinds is None else kinds(kind_B))

    return ask


def by_number(head: FlowHead, fixed_BH: Tensor | None, kinds: nn.Embedding | None, num_steps: int) -> Ask:
    """Of the numbers of K steps: all that can be asked is computed here, once for all rows and calls. At batch 1 that is two
    fifths of the weights that each step would read."""
    each, num_kinds = num_steps + 1, 1 if kinds is None else kinds.num_embeddings
    device = head.place_HF.device
    time_K = torch.cat([times(num_steps).float(), torch.zeros(1)]).to(device)
    kind_K = torch.arange(num_kinds, device=device).repeat_interleave(each)
    tables = head.ask(time_K.repeat(num_kinds), None if kinds is None else kinds(kind_K))

    def ask(index_B: Tensor, kind_B: Tensor) -> list[Tensor]:
        step, kind = index_B, kind_B
        if fixed_BH is not None:
            step, kind = torch.where(fixed_BH, num_steps, index_B[:, None]), kind_B[:, None]
        row = step + each * kind
        return [table[row] for table in tables]

    return ask
