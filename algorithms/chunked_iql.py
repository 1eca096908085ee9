"""Implicit Q-learning on chunks: values of what was done, and imitation of what was better than that (arXiv 2110.06169).

    value    = E |tau - 1[u < 0]| u^2,   u = min_j Qbar_j(s_t, c_t) - V(s_t)
    V'(s)    = V(s)
    policy   = E min( exp(beta A / rms A), w_max ) imitation loss of c_t,   A = min_j Qbar_j(s_t, c_t) - V(s_t)

No chunk is judged that nobody did: nothing is to be conservative about, and any policy that imitates will do. The imitation
loss stands for -log pi; of a flow it is advantage-weighted flow matching, which is not exactly the paper's regression.

Different: advantages are divided by their root mean square, a running mean of all ranks' batches, so that ``beta`` does not
depend on the size of rewards: with a success worth 1 they are of the size of 0.05, and the paper's beta of 3 would weigh all
alike (``normalise_advantages=false`` is the paper). Left out: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part
from algorithms.chunked_config import ChunkedRlConfig
from algorithms.chunked_rl import ChunkedRl
from algorithms.expectile import advantage_weights, expectile_loss
from algorithms.sampling import aggregated
from algorithms.td import chunk_return
from algorithms.values import value_like


class Iql(ChunkedRl):
    """See the header. Has the part "value" too, which is updated first."""

    defaults = {"imitate": "all", "critic_family": "mlp", "aggregate": "min", "policy_every": 1}
    scale_stat, smallest = "policy.advantage_square", 1e-6

    def __init__(self, policy: Any, config: ChunkedRlConfig, data: DataFacts = NO_FACTS) -> None:
        super().__init__(policy, config, data)
        self.value = value_like(policy.spec, {"num_bins": 1, **config.value})
        if data.statistics:
            self.value.set_statistics(data.statistics)
        self.parts = {"value": Part(self.value, self._critic_optimizer), **self.parts}
        self.losses["value"] = self._value_loss

    def next_value(self, obs: Mapping[str, Tensor], micro: Batch) -> Tensor:
        value_B: Tensor = self.value(obs)
        return value_B

    def _value_loss(self, micro: Batch) -> LossOutput:
        """The mean over rows whose chunks have a target."""
        weight_B = chunk_return(micro, micro.rewards_BH, 1.0, self.rewards.terminal_BH(micro))[2]
        value_B = self.value(micro.obs)
        loss_B = expectile_loss(self._judged(micro) - value_B, self.config.expectile) * weight_B
        return LossOutput(loss_B.sum(), weight_B.sum(), loss_B.detach(), {"value": value_B.detach().mean()})

    def _policy_loss(self, micro: Batch) -> LossOutput:
        """The mean over all valid actions, each times its chunk's weight."""
        with torch.no_grad():
            advantage_B = self._judged(micro) - self.value(micro.obs)
        unit = self._size**0.5 if self.config.normalise_advantages else 1.0
        weight_B = advantage_weights(advantage_B / unit, self.config.beta, self.config.max_weight)
        loss_B, num_valid_B = self._imitation(micro)
        loss_B = loss_B * weight_B
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "advantage": advantage_B.mean(),
            "advantage_square": (advantage_B**2).mean(),
            "weight_mean": weight_B.mean(),
            "at_most": (weight_B >= 0.999 * self.config.max_weight).float().mean(),
        }
        return LossOutput((loss_B * num_valid_B).sum(), num_valid_B.sum(), loss_B.detach(), stats)

    @torch.no_grad()
    def _judged(self, micro: Batch) -> Tensor:
        """(B,): what target critics say of the chunks that were executed."""
        return aggregated(self._target.module(micro.obs, micro.actions_BHA), self._choice("aggregate"))
