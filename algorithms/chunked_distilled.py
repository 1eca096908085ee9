"""Q-chunking without a choice: one pass of a network does what the flow policy would, and climbs the critics (QC-FQL, arXiv
2507.07969; flow Q-learning, arXiv 2502.02538).

    V'(s)    = agg_j Qbar_j(s, mu(s, z))
    policy   = imitation loss of all data: demonstrations, operators, its own
    actor    = E [ w ||mu(s, z) - flow(s, z)||^2 - mean_j Q_j(s, mu(s, z)) / mean |Q| ],   z ~ N(0, 1)
    acts     = mu

mu is a flow policy of one step: one Euler step from t = 1 (z) to t = 0 is a pass of the network over noise and observation. So
it is the policy of this run with ``num_steps`` 1, begins with its weights, and is published as such a policy; robots act N
times the flow's steps faster than by best-of-N. The squared distance is averaged over the chunk, on the scale of the data.

Different: the paper's w of 100 is for returns of about 100; here Q is divided by its size (its code's ``normalize_q_loss``), a
running mean of all ranks' batches. The paper's mu is a network of its own.

The policy is a flow without a density (noise_level 0): the same noise leads to the same chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part
from algorithms.chunked_config import ChunkedRlConfig
from algorithms.chunked_rl import ACTOR, NEXT, ChunkedRl
from algorithms.ema import Ema
from algorithms.policies.registry import build, load_published, published
from algorithms.sampling import aggregated, within_reach
from fleet.errors import ConfigError


class QChunkingDistilled(ChunkedRl):
    """See the header. Has the part "actor" too."""

    defaults = {"imitate": "all", "critic_family": "mlp", "aggregate": "mean", "policy_every": 1}
    scale_stat = "actor.q_size"

    def __init__(self, policy: Any, config: ChunkedRlConfig, data: DataFacts = NO_FACTS) -> None:
        super().__init__(policy, config, data)
        self.actor: Any = one_step(policy)
        self._ema = Ema(self.actor, config.ema_decay)
        self._keep(ema=self._ema)
        self.parts["actor"] = Part(self.actor, self._policy_optimizer)
        self.losses["actor"] = self._actor_loss

    def next_value(self, obs: Mapping[str, Tensor], micro: Batch) -> Tensor:
        actions_BHA = self.actor.act(obs, self._noise(self.actor, micro, NEXT, len(self._lengths))).actions_BHA
        values_KB = self._target.module(obs, within_reach(actions_BHA, self.critic.scale))
        return aggregated(values_KB, self._choice("aggregate"))

    def _actor_loss(self, micro: Batch) -> LossOutput:
        noise, scale = self._noise(self._policy, micro, ACTOR), self.critic.scale
        actions_BHA = self.actor.act(micro.obs, noise).actions_BHA
        with torch.no_grad():
            flow_BHA = self._policy.act(micro.obs, noise).actions_BHA
        distance_B = ((scale.normalise(actions_BHA) - scale.normalise(flow_BHA)) ** 2).mean((1, 2))
        q_B = self._q(micro, within_reach(actions_BHA, scale))
        loss_B = self.config.distill_weight * distance_B - self._climbs / self._size * q_B
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "q_size": q_B.detach().abs().mean(),
            "q": q_B.detach().mean(),
            "distance": distance_B.detach().mean(),
        }
        return LossOutput(loss_B.sum(), torch.ones_like(loss_B).sum(), loss_B.detach(), stats)


def one_step(policy: Any) -> nn.Module:
    """A flow policy of one step with the weights of ``policy``.

    Raises:
        ConfigError: The policy is no flow, or one that draws its steps.
    """
    fields = {field.name for field in dataclasses.fields(type(policy).Config)} if hasattr(type(policy), "Config") else set()
    if "num_steps" not in fields or policy.spec.density:
        raise ConfigError(
            f"chunked_rl with method q_chunking_distilled was given a policy of family {getattr(policy, 'family', '?')!r}"
            f"{' with a density' if policy.spec.density else ''}",
            rule="a flow policy whose steps are not drawn",
            remedy="policy.family=flow with noise_level 0; method q_chunking takes any policy that samples",
        )
    actor: nn.Module = build(policy.family, {**policy.config, "num_steps": 1})
    load_published(actor, published(policy))
    return actor
