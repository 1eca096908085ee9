"""Exponential moving average of a module: what acts, while the newest weights are what trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from algorithms.policies.frozen import copied
from algorithms.policies.registry import load_published, published


class Ema:
    """``module`` follows ``source``: parameters as average' = decay * average + (1 - decay) * source, buffers copied.
    Modules that are frozen for good (``source.frozen``) are shared, not copied.

    The decay is lowered in the first steps to step / (step + 10), so that random initial weights are soon forgotten.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self._source, self._decay = source, decay
        self.module = copied(source).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call once after each update; ``step`` counts from 0."""
        decay = min(self._decay, (step + 1) / (step + 11))
        pairs = list(zip(self.module.parameters(), self._source.parameters(), strict=True))
        averages = [average.detach() for average, value in pairs if average is not value]
        values = [value.detach().to(average.dtype) for average, value in pairs if average is not value]
        torch._foreach_lerp_(averages, values, 1.0 - decay)
        for average, value in zip(self.module.buffers(), self._source.buffers(), strict=True):
            if average is not value:  # a buffer that is written to counts as changed, and is sent to all ranks
                average.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Of what is not shared. The tensors are the live ones."""
        return published(self.module)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises PolicyError where names or shapes do not fit."""
        load_published(self.module, state)
