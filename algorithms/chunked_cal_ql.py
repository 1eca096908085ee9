"""CO-RFT: chunked offline reinforcement learning with a conservative critic and a policy that climbs it (arXiv 2508.02219).

    V'(s)    = min_j Qbar_j(s, pibar(s) + clipped noise)                            TD3, arXiv 1802.09477
    critic  += w E [ max(Q_H(s_t, pi(s_t)), G_t) - Q_H(s_t, c_t) ]                  Cal-QL, arXiv 2303.05479
    policy   = E [ -alpha Q_H(s_t, pi(s_t)) / mean |Q| + imitation loss of c_t ]    TD3+BC, arXiv 2106.06860

the last term where c_t is an expert's. The paper names its parts but publishes neither code nor formulas of how they meet: this
is a reconstruction. Each beginning of a chunk has a value (critics.py, ``causal``) and its own target. G_t is the return of the
stored episode, -inf where it is not known (then the gap is CQL's), of failures by time limit that of one that goes on for ever.

Left out: uniform samples (conservative.py says why), densities. The gap is linear: where Q(s, pi(s)) lies below G_t nothing
answers to -Q(c_t) but the squared error, which settles w / 2 too high. Papers take w = 5 for returns of tens to hundreds; for
successes of 1 it is 0.1 here.

Different: mean |Q| is a running mean of all ranks' batches, so that parts of a batch add up. The imitation loss is the
policy's own (L1, flow matching), not a squared distance. The policy needs a gradient through ``act``: ``mlp``, ``cnn`` and
``squashed`` have one, and flows, through all of their steps: few of them (policy.config.num_steps=4), or time and memory are
lost. Tokens have none. pi(s) is what a policy does without noise; of one without a density (a flow) it is a sample, since what
climbs at one draw of the noise stays where it was at the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, generator
from algorithms.chunked_config import ChunkedRlConfig
from algorithms.chunked_rl import ACTOR, NEXT, NEXT_NOISE, SAMPLES, ChunkedRl
from algorithms.conservative import conservative_gap
from algorithms.ema import Target
from algorithms.sampling import aggregated, has_gradient, sample_chunks, within_reach
from fleet.errors import ConfigError


class CalQl(ChunkedRl):
    """See the header."""

    defaults = {"imitate": "experts", "critic_family": "causal", "aggregate": "min", "policy_every": 2}
    scale_stat = "policy.q_size"

    def __init__(self, policy: Any, config: ChunkedRlConfig, data: DataFacts = NO_FACTS) -> None:
        super().__init__(policy, config, data)
        if not has_gradient(policy):
            raise ConfigError(
                f"chunked_rl with method cal_ql was given a policy of family {getattr(policy, 'family', '?')!r}",
                rule="what the policy does has a gradient",
                remedy="policy.family=mlp, cnn, squashed or flow; or method iql, which needs none",
            )
        self._policy_target = Target(policy, config.tau)
        self._keep(policy_target=self._policy_target)
        self.parts["policy"].after_update = self._policy_target.follow

    def next_value(self, obs: Mapping[str, Tensor], micro: Batch) -> Tensor:
        config, scale, target = self.config, self.critic.scale, self._policy_target.module
        num = len(self._lengths)
        actions_BHA = self._act(target, obs, micro, NEXT, num)
        shape = (config.batch_size, num, *actions_BHA.shape[1:])
        drawn = torch.randn(shape, generator=generator(config.seed, self._step, NEXT_NOISE))
        drawn_BHA = drawn[micro.index_B.cpu()].flatten(0, 1).to(actions_BHA.device)
        noise_BHA = (config.target_noise * drawn_BHA).clamp(-config.target_noise_clip, config.target_noise_clip)
        noisy_BHA = scale.restore(scale.normalise(actions_BHA) + noise_BHA)
        return aggregated(self._target.module(obs, within_reach(noisy_BHA, scale)), self._choice("aggregate"))

    def _penalty(self, micro: Batch, data_KB: Tensor, noise: Any) -> Tensor | None:
        config = self.config
        if config.conservative == "none":
            return None
        num = config.conservative_samples
        with torch.no_grad():
            if num == 1:
                actions_BHA = self._act(self._policy, micro.obs, micro, SAMPLES, 1)
            else:
                actions_BHA = sample_chunks(self._policy, micro.obs, self._noise(self._policy, micro, SAMPLES, num), num)
            actions_BHA = within_reach(actions_BHA, self.critic.scale)
            bound_B = self.rewards.return_B(micro).nan_to_num(nan=-torch.inf) if config.conservative == "cal_ql" else None
        value_KBN = self.critic(micro.obs, actions_BHA, noise).unflatten(1, (-1, num))
        gap_KB = conservative_gap(value_KBN, data_KB, bound_B=bound_B, temperature=config.temperature)
        return config.conservative_weight * gap_KB.mean(0)

    def _policy_loss(self, micro: Batch) -> LossOutput:
        """The mean over rows: those that are not imitated climb the critic alone."""
        actions_BHA = self._act(self._policy, micro.obs, micro, ACTOR, 1)
        q_B = self._q(micro, within_reach(actions_BHA, self.critic.scale))
        imitation_B, num_valid_B = self._imitation(micro)
        loss_B = imitation_B - self._climbs * self.config.q_weight / self._size * q_B
        imitated_B = (num_valid_B > 0).float()
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "q_size": q_B.detach().abs().mean(),
            "q": q_B.detach().mean(),
            "imitation": ((imitation_B * imitated_B).sum(), imitated_B.sum()),
        }
        return LossOutput(loss_B.sum(), torch.ones_like(loss_B).sum(), loss_B.detach(), stats)

    def _act(self, policy: Any, obs: Mapping[str, Tensor], micro: Batch, stream: int, num: int) -> Tensor:
        """Chunks by which the policy acts, in ``num`` states of each row."""
        noise = None if self._policy.spec.density else self._noise(self._policy, micro, stream, num)
        actions_BHA: Tensor = policy.act(obs, noise).actions_BHA
        return actions_BHA
