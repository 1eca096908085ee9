"""Q-chunking: a flow policy clones everything, and acts by the best of N chunks (arXiv 2507.07969).

    V'(s)    = agg_j Qbar_j(s, c'),   c' = argmax over c_1 .. c_N ~ pi(.|s) of agg_j Q_j(s, c)
    policy   = imitation loss of all data: demonstrations, operators, its own
    acts     = argmax over c_1 .. c_N ~ pi(.|s) of agg_j Q_j(s, c): policies/best_of.py, published with its critic

agg is the mean of the ensemble, as in the paper's code. What is better than cloning comes from the choice alone: the policy
never leaves what was done, so N bounds how far one can trust the critic.

Left out: nothing of the method. Different: chunks that end early are padded, not dropped (td.py); robots may replan before the
chunk's end. N chunks are drawn for B states in each update, so on a small machine ``target_samples`` is what an update costs.

Any policy that samples will do: flows, tokens, Gaussians.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import NO_FACTS, Batch, DataFacts
from algorithms.chunked_config import ChunkedRlConfig
from algorithms.chunked_rl import NEXT, ChunkedRl
from algorithms.policies.best_of import BestOf
from algorithms.sampling import aggregated, sample_chunks, within_reach


class QChunking(ChunkedRl):
    """See the header."""

    defaults = {"imitate": "all", "critic_family": "mlp", "aggregate": "mean", "policy_every": 1}

    def __init__(self, policy: Any, config: ChunkedRlConfig, data: DataFacts = NO_FACTS) -> None:
        super().__init__(policy, config, data)
        num, aggregate = config.num_samples, self._choice("aggregate")
        self._best = BestOf.around(self._ema.module, self.critic, num_samples=num, aggregate=aggregate)

    def next_value(self, obs: Mapping[str, Tensor], micro: Batch) -> Tensor:
        num, aggregate = self.config.target_samples, self._choice("aggregate")
        noise = self._noise(self._policy, micro, NEXT, num * len(self._lengths))
        actions_BHA = within_reach(sample_chunks(self._policy, obs, noise, num), self.critic.scale)
        value_BN = aggregated(self.critic(obs, actions_BHA), aggregate).unflatten(0, (-1, num))
        rows_B = torch.arange(len(value_BN), device=value_BN.device)
        best_BHA = actions_BHA.unflatten(0, (-1, num))[rows_B, value_BN.argmax(1)]
        return aggregated(self._target.module(obs, best_BHA), aggregate)

    def acting(self) -> nn.Module:
        """The best of N chunks of the policy's moving average, as the critic of now judges."""
        best: nn.Module = self._best
        return best
