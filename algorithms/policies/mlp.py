"""Chunked multi-task MLP: state and instruction -> H future actions.

Observation features are flattened, joined and normalised; the instruction's embedding is appended; LayerNorm + ReLU
layers follow. As a density it is a Gaussian around that output whose log standard deviation is a learned constant per action
dimension; each of the H steps is one decision (T = H).

Shape suffixes: B batch, H chunk length, A action dims, S joined observation dims, E embedding dims, F hidden width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import INSTRUCTION, Chunk, PolicySpec
from algorithms.policies.normalise import Normaliser
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError


@dataclasses.dataclass
class MlpConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes. Images are not for this family."""
    action_dim: int
    """A."""
    horizon: int = 8
    """H, actions in a chunk."""
    instruction_dim: int = 32
    """E, size of obs["instruction"]; 0 for a policy of one task."""
    width: int = 256
    """F, units of each hidden layer."""
    num_layers: int = 3
    """Hidden layers."""
    obs_gain: float = 2.0
    """Normalised observations are multiplied by this before the first layer."""
    log_std: float = -2.0
    """Initial log standard deviation of an action, in the action's units; the imitation loss leaves it alone."""


class MlpPolicy(nn.Module):
    """See the header. Implements ``algorithms.policies.base.Policy``."""

    Config = MlpConfig

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        reads = {name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())}
        if (
            not reads
            or min(config.action_dim, config.horizon, config.width, config.num_layers) < 1
            or config.instruction_dim < 0
        ):
            raise PolicyError(
                f"mlp policy of {config}", rule="reads is not empty; sizes are at least 1, instruction_dim at least 0"
            )
        self._instruction_dim, self._obs_gain = config.instruction_dim, config.obs_gain
        conditions = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
        self.spec = PolicySpec(reads, conditions, config.action_dim, config.horizon, density=True)
        self.normaliser = Normaliser(reads)
        sizes = [self.normaliser.size + config.instruction_dim] + [config.width] * config.num_layers
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(sizes):
            layers += [nn.Linear(num_in, num_out), nn.LayerNorm(num_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(config.width, config.horizon * config.action_dim)
        self.log_std_A = nn.Parameter(torch.full((config.action_dim,), float(config.log_std)))

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of observations; actions are taken as they are."""
        self.normaliser.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal (B, H, A)."""
        return torch.randn(batch_size, self.spec.horizon, self.spec.action_dim, generator=generator)

    def act(self, obs: Mapping[str, Tensor], noise: Tensor | None = None, guidance: float = 1.0) -> Chunk:
        """The mean, or a sample if ``noise`` is given. This family has no guidance: the value is not used."""
        mean_BHA = self._mean(obs)
        actions_BHA = mean_BHA if noise is None else mean_BHA + self.log_std_A.exp() * noise
        return Chunk(actions_BHA, self._log_density(mean_BHA, actions_BHA))

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, H): log density of each action of the chunk, summed over A."""
        return self._log_density(self._mean(obs), chunk.actions_BHA)

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """Each step is a decision."""
        return mask_BH

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): L1 distance of the mean, averaged over A and the valid actions; 0 where none is valid."""
        # Masked actions may be padded with anything, NaN included: they must not reach the difference.
        target_BHA = torch.where(mask_BH[..., None] > 0, chunk.actions_BHA, torch.zeros_like(chunk.actions_BHA))
        error_BH = (self._mean(obs) - target_BHA).abs().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): the last hidden layer."""
        joined_BS = self._obs_gain * self.normaliser(obs)
        if self.spec.conditions:
            # A unit vector of E elements would be drowned by the features, which have about unit variance each.
            joined_BS = torch.cat([joined_BS, obs[INSTRUCTION] * math.sqrt(self._instruction_dim)], 1)
        hidden_BF: Tensor = self.trunk(joined_BS)
        return hidden_BF

    def _mean(self, obs: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self.head(self.embed(obs))
        return out.unflatten(1, (self.spec.horizon, self.spec.action_dim))

    def _log_density(self, mean_BHA: Tensor, actions_BHA: Tensor) -> Tensor:
        scaled_BHA = (actions_BHA - mean_BHA) * torch.exp(-self.log_std_A)
        log_density_BHA = -0.5 * scaled_BHA**2 - self.log_std_A - 0.5 * math.log(2 * math.pi)
        return log_density_BHA.sum(-1)
