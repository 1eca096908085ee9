"""Why token policies of few demonstrations stay behind ``mlp``: its own network, with other losses.

``SquaredMlp`` learns the mean instead of the median; ``LevelsMlp`` says a distribution over levels for each number, learns by
cross-entropy and acts by its expectation, as a token policy with parallel decoding does.

Shape suffixes: B batch, H chunk length, A action dims, T numbers of a chunk, V levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import Chunk
from algorithms.policies.gaussian import MlpConfig, MlpPolicy
from algorithms.policies.token_codec import Codec, filled
from algorithms.policies.token_decoding import cross_entropy


class SquaredMlp(MlpPolicy):
    """``mlp`` with the mean squared error."""

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,)."""
        target_BHA = filled(chunk.actions_BHA, mask_BH)
        error_BH = (self._output(self._hidden(obs, noise)) - target_BHA).square().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)


@dataclasses.dataclass
class LevelsConfig(MlpConfig):
    num_bins: int = 31
    """V."""
    blur: float = 0.75
    """As of the family ``token``."""


class LevelsMlp(MlpPolicy):
    """``mlp`` whose output is V logits for each of the T = H A numbers of a chunk, all of them in [-1, 1]."""

    Config = LevelsConfig

    def __init__(self, config: LevelsConfig) -> None:
        super().__init__(config)
        self.codec, self._blur = Codec(config.horizon, config.action_dim, config.num_bins), config.blur
        self.head = nn.Linear(config.width, self.codec.num_tokens * config.num_bins)

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,)."""
        tokens_BT = self.codec.encode(filled(chunk.actions_BHA, mask_BH))
        return cross_entropy(self._logits(self._hidden(obs, noise)), tokens_BT, self.codec.mask(mask_BH), self._blur)

    def _logits(self, hidden_BF: Tensor) -> Tensor:
        return self.head(hidden_BF).unflatten(1, (self.codec.num_tokens, -1)).float()

    def _output(self, hidden_BF: Tensor) -> Tensor:
        chance_BTV = self._logits(hidden_BF).softmax(-1)
        return self.codec.decode(chance_BTV @ torch.arange(self.codec.vocabulary, device=chance_BTV.device).float())
