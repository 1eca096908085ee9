"""Exponential moving average of a module: what acts, while the newest weights are what trains."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """``module`` follows ``source``: parameters as average' = decay * average + (1 - decay) * source, buffers copied.

    The decay is lowered in the first steps to step / (step + 10), so that random initial weights are soon forgotten.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self._source, self._decay = source, decay
        self.module = copy.deepcopy(source).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call once after each update; ``step`` counts from 0."""
        decay = min(self._decay, (step + 1) / (step + 11))
        averages = [p.detach() for p in self.module.parameters()]
        values = [p.detach().to(a.dtype) for a, p in zip(averages, self._source.parameters(), strict=True)]
        torch._foreach_lerp_(averages, values, 1.0 - decay)
        for average, value in zip(self.module.buffers(), self._source.buffers(), strict=True):
            average.copy_(value)
