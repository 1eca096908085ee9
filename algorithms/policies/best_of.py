"""Best of N: a policy that draws N chunks and acts by the one that a critic values most (Q-chunking, arXiv 2507.07969).

It wraps any policy that samples. The critic is a part of it, and so of its releases: robots judge with the critic that was
trained with these weights.

Shape suffixes: B batch, N samples, H chunk length, A action dims, K critics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.critics import build_critic
from algorithms.policies import registry
from algorithms.policies.base import Chunk
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError

AGGREGATES = ("mean", "min")
_FIXED_SEED = 0


@dataclasses.dataclass
class BestOfConfig:
    policy: Mapping[str, Any]
    """Of the policy that proposes: {"family": ..., "config": ...}."""
    critic: Mapping[str, Any]
    """Of the critic: {"family": a key of ``algorithms.critics.CRITICS``, "config": ...}."""
    num_samples: int = 32
    """N. Inference takes about N times as long as that of the policy."""
    aggregate: str = "mean"
    """How the values of an ensemble become one: "mean" or "min"."""


class BestOf(nn.Module):
    """See the header. Implements ``algorithms.policies.base.Policy``; losses and features are the wrapped policy's. What it
    selects has no density."""

    Config = BestOfConfig

    def __init__(self, config: BestOfConfig, policy: Any = None, critic: Any = None) -> None:
        super().__init__()
        if config.num_samples < 1 or config.aggregate not in AGGREGATES:
            raise PolicyError(
                f"best of {config.num_samples} samples by the {config.aggregate!r} of critics",
                rule=f"at least one sample, one of {AGGREGATES}",
            )
        for part in ("policy", "critic"):
            if set(getattr(config, part)) != {"family", "config"}:
                raise PolicyError(f"{part} of best_of is {getattr(config, part)}", rule='{"family": ..., "config": ...}')
        self.policy = policy or registry.build(config.policy["family"], config.policy["config"])
        self.critic = critic or build_critic(config.critic["family"], config.critic["config"])
        self.num_samples, self.aggregate = config.num_samples, config.aggregate
        self._describe()

    @classmethod
    def around(cls, policy: Any, critic: Any, *, num_samples: int = 32, aggregate: str = "mean") -> Any:
        """Wraps a policy and a critic as they are: all three share the weights.

        Args:
            policy: Of ``algorithms.policies.registry.build``.
            critic: Of ``algorithms.critics.build_critic``.

        Raises:
            PolicyError: They are of other horizons or actions.
        """
        config: dict[str, Any] = {
            "policy": {"family": policy.family, "config": policy.config},
            "critic": {"family": critic.family, "config": critic.config},
            "num_samples": num_samples,
            "aggregate": aggregate,
        }
        best: Any = cls(BestOfConfig(**config), policy, critic)
        best.family, best.config = "best_of", config  # as ``registry.build`` does
        return best

    def _describe(self) -> None:
        own, judged = self.policy.spec, self.critic.spec
        if (own.horizon, own.action_dim) != (judged.horizon, judged.action_dim):
            raise PolicyError(
                f"the critic judges chunks of {judged.horizon} x {judged.action_dim}",
                rule=f"the policy proposes chunks of {own.horizon} x {own.action_dim}",
            )
        reads, conditions = {**judged.reads, **own.reads}, {**judged.conditions, **own.conditions}
        for name, shape in (*judged.reads.items(), *judged.conditions.items()):
            if {**reads, **conditions}[name] != shape:
                raise PolicyError(f"the critic reads {name!r} of shape {shape}", rule="policy and critic read alike")
        self.spec = dataclasses.replace(own, reads=reads, conditions=conditions, replay={}, density=False)
        self.frozen = tuple(f"policy.{name}" for name in getattr(self.policy, "frozen", ()))

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of policy and critic."""
        self.policy.set_statistics(statistics)
        self.critic.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> Any:
        """The policy's noise for N draws of each row: (B, N, ...)."""
        drawn = self.policy.noise(batch_size * self.num_samples, generator)
        return _each(drawn, lambda value: value.unflatten(0, (batch_size, self.num_samples)))

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """The best of N draws; without ``noise`` the same N draws each time, for every row."""
        batch = next(iter(obs.values())).shape[0]
        if noise is None:
            once = self.policy.noise(self.num_samples, torch.Generator().manual_seed(_FIXED_SEED))
            drawn = _each(once, lambda value: value.repeat(batch, *[1] * (value.dim() - 1)))
        else:
            drawn = _each(noise, lambda value: value.flatten(0, 1))
        repeated = {name: value.repeat_interleave(self.num_samples, 0) for name, value in obs.items()}
        actions = self.policy.act(repeated, drawn, guidance).actions_BHA
        values_KB = self.critic(obs, actions)
        value_BN = (values_KB.mean(0) if self.aggregate == "mean" else values_KB.amin(0)).unflatten(0, (batch, -1))
        best_B = value_BN.argmax(1)
        chosen_BHA = actions.unflatten(0, (batch, -1))[torch.arange(batch, device=best_B.device), best_B]
        return Chunk(chosen_BHA + 0 * value_BN.sum(1)[:, None, None])  # values that are not finite select nothing

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """Raises PolicyError: the density of what was selected is not known."""
        raise PolicyError(
            "the best of several samples has no density", rule="use the wrapped policy's log_prob for its own chunks"
        )

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """Raises PolicyError: there are no decisions with a density."""
        raise PolicyError("the best of several samples has no density", rule="decisions are those of a density")

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """The policy's, with the first of the N draws."""
        loss_B: Tensor = self.policy.imitation_loss(obs, chunk, mask_BH, _each(noise, lambda value: value[:, 0]))
        return loss_B

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): the policy's."""
        features_BF: Tensor = self.policy.embed(obs)
        return features_BF


def _each(noise: Any, change: Any) -> Any:
    """``change`` for every tensor of a policy's noise."""
    if noise is None:
        return None
    return {name: _each(value, change) for name, value in noise.items()} if isinstance(noise, Mapping) else change(noise)
