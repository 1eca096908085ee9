"""Reinforcement learning from recorded chunks of actions: offline from demonstrations, then on what the fleet does.

    critic    E mean_k mean_j ( Q_j(s_t, a_{t:t+k}) - y_k )^2,   y_k = sum_{i<k} gamma^i r_{t+i} + gamma^k V'(s_{t+k})

k = H alone, the whole chunk, or with the critic ``causal`` every beginning of it too; j counts an ensemble with LayerNorm; V'
is of target networks. rewards.py says what a step is worth, td.py what becomes of chunks that end early. Methods differ in V',
in what else the critic learns, in how the policy learns, and in what acts:

    cal_ql                  chunked_cal_ql.py        CO-RFT: conservative critics, a policy that climbs them
    q_chunking              chunked_q.py             a cloned flow acts by the best of N chunks
    q_chunking_distilled    chunked_distilled.py     one pass of a network stands for the flow, and climbs the critics
    iql                     chunked_iql.py           imitation weighed by advantages

Chunks that end early are filled with their last action. What is imitated is cut where somebody else takes over; what critics
judge is not: whoever acted, the chunk was executed.

Shape suffixes: B batch, H chunk length, A action dims, K critics, L beginnings, N samples.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part
from algorithms.chunked_config import AUTO, ChunkedRlConfig, check_chunked
from algorithms.critics import critic_like
from algorithms.ema import Average, Ema, Target
from algorithms.policies.base import Chunk
from algorithms.rewards import RewardWatch
from algorithms.sampling import aggregated, noise_of_samples
from algorithms.td import prefix_return
from algorithms.windows import cut_at_takeover, fill_with_last_action
from fleet.batch import BatchNeeds, Within
from fleet.errors import ConfigError
from fleet.lookup import resolve
from fleet.robot import Source

METHODS = {
    "cal_ql": "algorithms.chunked_cal_ql:CalQl",
    "q_chunking": "algorithms.chunked_q:QChunking",
    "q_chunking_distilled": "algorithms.chunked_distilled:QChunkingDistilled",
    "iql": "algorithms.chunked_iql:Iql",
}
IMITATION, SEEN, NEXT, NEXT_NOISE, SAMPLES, ACTOR = range(6)  # streams of random numbers
EXPERTS = (Source.DEMO, Source.OPERATOR)
SCALE_SHARE = 0.01  # of the newest batch in the running mean of ``scale_stat``


class ChunkedRl(abc.ABC):
    """Implements ``algorithms.base.Algorithm``; makes the method that its config names. All have the parts "critic" and
    "policy".

    Raises:
        ConfigError: A setting is out of its range, or the method cannot train this policy.
    """

    name = "chunked_rl"
    Config = ChunkedRlConfig
    defaults: Mapping[str, Any] = {}
    """What ``auto`` and 0 mean for a method: imitate, critic_family, aggregate, policy_every."""
    scale_stat = ""
    """Of what values are divided by: the stat that it is the running mean of."""
    smallest = 0.01
    """What values are divided by at least: where nothing was rewarded yet, nothing but noise would be magnified."""

    def __new__(cls, policy: Any, config: ChunkedRlConfig, data: DataFacts = NO_FACTS) -> ChunkedRl:
        method = resolve(METHODS, config.method, kind="chunked_rl.method", error=ConfigError) if cls is ChunkedRl else cls
        made: ChunkedRl = object.__new__(method)
        return made

    def __init__(self, policy: Any, config: ChunkedRlConfig, data: DataFacts = NO_FACTS) -> None:
        check_chunked(config, policy.spec.horizon)
        self.config, self.advice, self.rewards = config, "", config.rewards()
        self._policy, self._step, self._scale, self._watch = policy, 0, 0.0, RewardWatch(self.rewards)
        family = self._choice("critic_family")
        self.critic = critic_like(policy.spec, family, {"num_critics": config.num_critics, **config.critic})
        if data.statistics:
            self.critic.set_statistics(data.statistics)
        horizon, stride = policy.spec.horizon, config.prefix_stride
        self._lengths = (*range(stride, horizon, stride), horizon) if family == "causal" else (horizon,)
        self._target, self._ema = Target(self.critic, config.tau), Ema(policy, config.ema_decay)
        self._averages: dict[str, Average] = {}
        self.frozen: dict[str, nn.Module] = {}
        self._keep(target=self._target, ema=self._ema)
        self.parts = {
            "critic": Part(self.critic, self._critic_optimizer, after_update=self._target.follow),
            "policy": Part(policy, self._policy_optimizer, every=self._choice("policy_every")),
        }
        self.losses: dict[str, Callable[[Batch], LossOutput]] = {"critic": self._critic_loss, "policy": self._policy_loss}
        self._require_tasks_told_apart(data)
        shares: dict[tuple[Source, ...], float] = {
            (Source.DEMO,): config.demo_share,
            (Source.POLICY, Source.OPERATOR): 1 - config.demo_share,
        }
        reads = tuple(sorted({*policy.spec.reads, *self.critic.spec.reads}))
        offsets = (0, *self._lengths)
        self.needs = BatchNeeds(config.batch_size, horizon, reads, shares, offsets, Within.EPISODE, discount=config.discount)

    def prepare(self, batch: Batch) -> Batch:
        """Actions that were not executed are the last ones that were; the mask says still which these are."""
        return dataclasses.replace(batch, actions_BHA=fill_with_last_action(batch).actions_BHA)

    def loss(self, part: str, micro: Batch) -> LossOutput:
        return self.losses[part](micro)

    def after_step(self, step: int, stats: Mapping[str, float]) -> None:
        """``step`` counts from 0."""
        self._ema.update(step)
        self._step = step + 1
        self._watch.see({name.removeprefix("critic."): value for name, value in stats.items() if name.startswith("critic.")})
        part = self.parts.get(self.scale_stat.split(".")[0])
        if part is not None and step % part.every == 0:
            seen = stats[self.scale_stat]
            self._scale += (SCALE_SHARE if self._scale else 1.0) * (seen - self._scale)
        self.advice = self._watch.advice

    def acting(self) -> nn.Module:
        """The moving average of the policy."""
        return self._ema.module

    def state_dict(self) -> dict[str, Any]:
        averages = {name: average.state_dict() for name, average in self._averages.items()}
        return {"step": self._step, "scale": self._scale, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._scale = int(state["step"]), float(state["scale"])
        for name, average in self._averages.items():
            average.load_state_dict(state["averages"][name])

    @abc.abstractmethod
    def next_value(self, obs: Mapping[str, Tensor], micro: Batch) -> Tensor:
        """V' of the states behind each beginning, (B L,): those of a row behind each other. Called without gradients."""

    def _policy_loss(self, micro: Batch) -> LossOutput:
        """The mean imitation loss over all valid actions."""
        loss_B, num_valid_B = self._imitation(micro)
        return LossOutput((loss_B * num_valid_B).sum(), num_valid_B.sum(), loss_B.detach(), {})

    def _penalty(self, micro: Batch, data_KB: Tensor, noise: Any) -> Tensor | None:
        """(B,): what is added to the critic's loss. ``data_KB``: values of the whole chunks of the data."""
        return None

    def _critic_loss(self, micro: Batch) -> LossOutput:
        """See the header. The mean over rows of which something is known."""
        noise = self._noise(self.critic, micro, SEEN)
        if len(self._lengths) > 1:
            columns = [length - 1 for length in self._lengths]
            values_KBL = self.critic.prefixes(micro.obs, micro.actions_BHA, noise)[..., columns]
        else:
            values_KBL = self.critic(micro.obs, micro.actions_BHA, noise)[..., None]
        target_BL, weight_BL = self._targets(micro)
        td_B, weight_B = ((values_KBL - target_BL) ** 2).mean((0, 2)), weight_BL[:, -1]
        penalty_B = self._penalty(micro, values_KBL[..., -1], noise)
        loss_B = (td_B if penalty_B is None else td_B + penalty_B) * weight_B
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "td": ((td_B * weight_B).sum(), weight_B.sum()),
            "q": values_KBL[..., -1].mean(),
            "target": ((target_BL[:, -1] * weight_B).sum(), weight_B.sum()),
            **({} if penalty_B is None else {"penalty": ((penalty_B * weight_B).sum(), weight_B.sum())}),
            **self.rewards.stats(micro),
        }
        return LossOutput(loss_B.sum(), weight_B.sum(), loss_B.detach(), stats)

    @torch.no_grad()
    def _targets(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """y and weight of each beginning, (B, L). All of a row weigh alike."""
        rewards_BH, terminal_BH = self.rewards.rewards_BH(micro), self.rewards.terminal_BH(micro)
        reward_BL, bootstrap_BL, weight_BL = prefix_return(micro, rewards_BH, self.config.discount, self._lengths, terminal_BH)
        ahead = [micro.obs_at[length] for length in self._lengths]
        obs = {name: torch.stack([one[name] for one in ahead], 1).flatten(0, 1) for name in ahead[0]}
        value_BL = self.next_value(obs, micro).unflatten(0, (-1, len(self._lengths)))
        return reward_BL + bootstrap_BL * value_BL, weight_BL

    def _imitation(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """The policy's imitation loss of each row, and of how many actions it is the mean: 0 of rows that are not imitated."""
        whole = cut_at_takeover(fill_with_last_action(micro) if self.config.fill_ends else micro)
        imitated_B = torch.ones_like(micro.source_B, dtype=torch.bool)
        if self._choice("imitate") == "experts":
            imitated_B = (micro.source_B == EXPERTS[0]) | (micro.source_B == EXPERTS[1])
        mask_BH = whole.mask_BH.float() * imitated_B[:, None]
        noise = self._noise(self._policy, micro, IMITATION)
        loss_B = self._policy.imitation_loss(micro.obs, Chunk(whole.actions_BHA), mask_BH, noise)
        return loss_B, mask_BH.sum(-1)

    def _keep(self, **averages: Average) -> None:
        """Has modules that follow others placed and saved."""
        self._averages |= averages
        self.frozen |= {name: average.module for name, average in averages.items()}

    def _q(self, micro: Batch, actions_BHA: Tensor) -> Tensor:
        """(B,): what the critics say of other chunks in these states, on average."""
        return aggregated(self.critic(micro.obs, actions_BHA, self._noise(self.critic, micro, SEEN)), "mean")

    def _noise(self, module: Any, micro: Batch, stream: int, num: int = 1) -> Any:
        return noise_of_samples(module, micro, self.config.batch_size, num, self.config.seed, self._step, stream)

    @property
    def _size(self) -> float:
        """What values are divided by; 1 before the first update."""
        return max(self._scale, self.smallest) if self._scale else 1.0

    @property
    def _climbs(self) -> bool:
        """Whether critics know enough to be climbed."""
        return self._step >= self.config.critic_steps

    def _choice(self, setting: str) -> Any:
        """What a setting says, or the method where it says nothing."""
        value = getattr(self.config, setting)
        return self.defaults[setting] if value in (AUTO, 0) else value

    def _critic_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.config.critic_learning_rate, weight_decay=0.0)

    def _policy_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)

    def _require_tasks_told_apart(self, data: DataFacts) -> None:
        if len(data.tasks) > 1 and not self.critic.spec.conditions:
            raise ConfigError(
                f"chunked_rl has a critic that does not read the instruction, and {len(data.tasks)} tasks",
                rule="with several tasks critics read obs['instruction']",
                remedy="set critic.instruction_dim, and value.instruction_dim of iql, to the size of the run's embeddings",
            )
