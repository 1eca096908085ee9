"""Moving averages of modules: what acts, while the newest weights are what trains, and target networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from algorithms.policies.frozen import copied
from algorithms.policies.registry import load_published, published


class Average:
    """``module`` begins as a copy of ``source`` and follows it. Modules that are frozen for good are shared."""

    def __init__(self, source: nn.Module) -> None:
        self._source = source
        self.module = copied(source).requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Tensor]:
        """Of what is not shared. The tensors are the live ones."""
        return published(self.module)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises PolicyError where names or shapes do not fit."""
        load_published(self.module, state)


class Ema(Average):
    """What acts: parameters as average' = decay * average + (1 - decay) * source, buffers copied.

    The decay is lowered in the first steps to step / (step + 10), so that random initial weights are soon forgotten.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        super().__init__(source)
        self._decay = decay

    def update(self, step: int) -> None:
        """Call once after each update; ``step`` counts from 0."""
        polyak(self.module, self._source, 1.0 - min(self._decay, (step + 1) / (step + 11)))


class Target(Average):
    """A target network: target' = (1 - tau) * target + tau * source, buffers copied."""

    def __init__(self, source: nn.Module, tau: float) -> None:
        super().__init__(source)
        self._tau = tau

    def follow(self) -> None:
        """For ``Part.after_update``."""
        polyak(self.module, self._source, self._tau)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Parameters: target' = (1 - tau) target + tau source. Buffers are copied; what both share is left alone."""
    pairs = list(zip(target.parameters(), source.parameters(), strict=True))
    averages = [average.detach() for average, value in pairs if average is not value]
    values = [value.detach().to(average.dtype) for average, value in pairs if average is not value]
    torch._foreach_lerp_(averages, values, tau)
    for average, value in zip(target.buffers(), source.buffers(), strict=True):
        if average is not value:  # a buffer that is written to counts as changed, and is sent to all ranks
            average.copy_(value)
