"""RLPD on chunks: soft actor-critic that draws half of each batch from demonstrations (arXiv 2302.02948), over chunks of H
actions as in Q-chunking (arXiv 2507.07969), with operators' steps on both sides as in HIL-SERL (arXiv 2410.21845).

    y = sum_{i<H} gamma^i r_{t+i} + m gamma^H [ min_{j in Z} Qbar_j(s_{t+H}, c') - alpha log pi(c'|s_{t+H}) ],  c' ~ pi(s_{t+H})
    L_critic      = E mean_j (Q_j(s_t, c_t) - y)^2
    L_policy      = E [ alpha log pi(c|s_t) - mean_j Q_j(s_t, c) + bc_alpha imitation loss ],  c ~ pi(s_t)
    L_temperature = E alpha ( -log pi(c|s_t) - target entropy )

m is 0 behind a step that ends the task, else 1; rewards.py says which steps these are, td.py what becomes of chunks that
end early. Z are ``num_targets`` of the critics, drawn anew for each update. A step makes ``utd`` updates of the critics, each
by its own part of the batch and followed by Qbar <- Qbar + tau (Q - Qbar), then one of policy and temperature by the last part.
log pi is a sum over the chunk, of actions on the scale [-1, 1], in which the target entropy is stated too.

With one action a chunk, ``utd`` 1, as many targets as critics and ``actor_q: min`` this is SAC (arXiv 1812.05905).

Sources: one half demonstrations and operators' steps, one half what came of the fleet: the policy's and operators' steps. Where
one half has no data the other is the whole batch. The imitation term is of demonstrations and operators' steps, up to the first
step of somebody else.

Left out: HIL-SERL's discrete critic of the gripper, which here is an element of the action like others. Other than in
Q-chunking's RLPD the imitation term is the policy's own loss, not its likelihood: that has no maximum where demonstrations lie
at the bounds of the action. Added: the average of the policy acts; the policy may wait for the critics (``critic_steps``).

Shape suffixes: B batch, H chunk length, A action dims, K critics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part, generator, noise_of
from algorithms.critics import critic_like
from algorithms.ema import Ema, Target
from algorithms.policies.base import Chunk
from algorithms.rewards import RewardConfig, RewardWatch
from algorithms.td import chunk_return
from algorithms.windows import cut_at_takeover, fill_with_last_action
from fleet.batch import BatchNeeds, Within
from fleet.errors import ConfigError
from fleet.robot import Source

ACTOR_Q = ("mean", "min")
MAX_UTD = 64
_TARGET, _ACTOR, _TEMPERATURE, _IMITATION, _SEEN, _SEEN_AFTER, _SUBSET = range(7)  # streams; subsets take one an update


@dataclasses.dataclass
class RlpdConfig(RewardConfig):
    batch_size: int = 256
    """B of one update, windows; a step draws ``utd`` times as many."""
    utd: int = 4
    """Updates of the critics a step, with one of the policy. RLPD's paper makes 20, HIL-SERL 2."""
    demo_share: float = 0.5
    """Part of the batch that is demonstrations and operators' steps; the rest are the policy's and operators' steps."""
    num_critics: int = 10
    """K. HIL-SERL: 2."""
    num_targets: int = 2
    """How many of them, drawn for each update, judge what follows: their smallest value counts."""
    critic: dict[str, Any] = dataclasses.field(default_factory=lambda: {"width": 256, "num_layers": 3})
    """Fields of the critics' Config (critics.py): width, num_layers, vision, shift_pixels."""
    tau: float = 0.005
    """How far the target critics follow in an update."""
    backup_entropy: bool = True
    """Whether the entropy of what follows is part of the target. HIL-SERL: false."""
    actor_q: str = "mean"
    """What the policy climbs: the ``mean`` of the critics, or their ``min`` (SAC)."""
    temperature: float = 0.01
    """alpha at the beginning. 1 in RLPD; with success as reward and a chunk's entropy that drowns what is to be learnt."""
    target_entropy: float = -0.5
    """Of an action's element on the scale [-1, 1]; times H A."""
    bc_alpha: float = 0.0
    """Weight of the imitation term, which keeps a policy that began with cloning from being led away by young critics."""
    critic_steps: int = 0
    """Steps at the beginning that train the critics alone, where the policy can act already."""
    learning_rate: float = 3e-4
    """Adam's, of the policy."""
    critic_learning_rate: float = 3e-4
    """Adam's, of the critics."""
    temperature_learning_rate: float = 3e-4
    """Adam's, of log alpha; 0 keeps it."""
    ema_decay: float = 0.995
    """Of the average that acts; 0 publishes the newest weights."""
    seed: int = 0
    """Of actions, subsets of critics, and whatever noise the imitation draws."""


class Rlpd:
    """Implements ``algorithms.base.Algorithm`` with the parts "critic", "policy" and "temperature".

    Raises:
        ConfigError: A value is out of its range, or the policy has no density of its own actions.
    """

    name = "rlpd"
    Config = RlpdConfig

    def __init__(self, policy: Any, config: RlpdConfig, data: DataFacts = NO_FACTS) -> None:
        _check(config)
        _require_density(policy)
        self.config, self._policy, self.advice = config, policy, ""
        self._step = self._update = self._num_steps = 0  # the run's step, its update of the critics, steps made here
        self._rewards = config.rewards()
        self._watch = RewardWatch(self._rewards)
        self._critic = critic_like(policy.spec, "mlp", {**config.critic, "num_critics": config.num_critics})
        if data.statistics:
            self._critic.set_statistics(data.statistics)
        self._target = Target(self._critic, config.tau)
        self._temperature = Temperature(config.temperature)
        self._ema = Ema(policy, config.ema_decay)
        adam = {"critic": config.critic_learning_rate, "policy": config.learning_rate}
        adam["temperature"] = config.temperature_learning_rate
        modules = {"critic": self._critic, "policy": policy, "temperature": self._temperature}
        self.parts = {name: Part(modules[name], _adam(rate), config.utd, updates=1) for name, rate in adam.items()}
        self.parts["critic"] = dataclasses.replace(self.parts["critic"], updates=0, after_update=self._follow)
        self.frozen: dict[str, nn.Module] = {"target": self._target.module}
        shares: dict[tuple[Source, ...], float] = {
            (Source.DEMO, Source.OPERATOR): config.demo_share,
            (Source.POLICY, Source.OPERATOR): 1 - config.demo_share,
        }
        spec = policy.spec
        self.needs = BatchNeeds(
            config.batch_size * config.utd,
            spec.horizon,
            tuple(spec.reads),
            shares,
            offsets=(0, spec.horizon),
            within=Within.EPISODE,
            discount=config.discount,
        )

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, part: str, micro: Batch) -> LossOutput:
        """Means over the rows; of the critics, over those whose chunk is known."""
        return {"critic": self._critic_loss, "policy": self._policy_loss, "temperature": self._temperature_loss}[part](micro)

    def after_step(self, step: int, stats: Mapping[str, float]) -> None:
        """``step`` counts from 0, and may have begun with another algorithm."""
        self._ema.update(step)
        self._step, self._update, self._num_steps = step + 1, 0, self._num_steps + 1
        seen = {name.removeprefix("critic."): value for name, value in stats.items() if name.startswith("critic.")}
        self._watch.see(seen)
        self.advice = _advice(seen) or self._watch.advice

    def acting(self) -> nn.Module:
        """The moving average of the policy. Robots explore with it where they draw (``actor.sample``)."""
        return self._ema.module

    def state_dict(self) -> dict[str, Any]:
        averages = {"ema": self._ema.state_dict(), "target": self._target.state_dict()}
        return {"step": self._step, "num_steps": self._num_steps, **averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._num_steps = int(state["step"]), int(state["num_steps"])
        self._ema.load_state_dict(state["ema"])
        self._target.load_state_dict(state["target"])

    def _critic_loss(self, micro: Batch) -> LossOutput:
        target_B, weight_B = self._target_value(micro)
        # Behind a chunk's end its last action goes on: what the padding holds must not be seen.
        actions_BHA = fill_with_last_action(micro).actions_BHA
        values_KB = self._critic(micro.obs, actions_BHA, self._noise(self._critic, micro, _SEEN))
        loss_B = ((values_KB - target_B) ** 2).mean(0) * weight_B
        stats = {"value": ((values_KB.mean(0) * weight_B).sum(), weight_B.sum()), **self._rewards.stats(micro)}
        stats["spread"] = ((values_KB.std(0, correction=0) * weight_B).sum(), weight_B.sum())
        for name, sources in (("demo", (Source.DEMO, Source.OPERATOR)), ("online", (Source.POLICY, Source.OPERATOR))):
            stats[f"share_{name}"] = _is_of(micro.source_B, sources).float().mean()
        return LossOutput(loss_B.sum(), weight_B.sum(), loss_B.detach(), stats)

    @torch.no_grad()
    def _target_value(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """y_B and weight_B of the header's y; 0 where nothing is known of the chunk."""
        config, after = self.config, micro.obs_at[self._policy.spec.horizon]
        chunk = self._policy.act(after, self._noise(self._policy, micro, _TARGET))
        values_KB = self._target.module(after, chunk.actions_BHA, self._noise(self._critic, micro, _SEEN_AFTER))
        value_B = values_KB[self._subset().to(values_KB.device)].amin(0)
        if config.backup_entropy:
            value_B = value_B - self._temperature.alpha() * self._log_density(chunk)
        reward_BH, terminal_BH = self._rewards.rewards_BH(micro), self._rewards.terminal_BH(micro)
        reward_B, bootstrap_B, weight_B = chunk_return(micro, reward_BH, config.discount, terminal_BH)
        return reward_B + bootstrap_B * value_B, weight_B

    def _policy_loss(self, micro: Batch) -> LossOutput:
        chunk = self._policy.act(micro.obs, self._noise(self._policy, micro, _ACTOR))
        values_KB, log_density_B = self._critic(micro.obs, chunk.actions_BHA), self._log_density(chunk)
        value_B = values_KB.mean(0) if self.config.actor_q == "mean" else values_KB.amin(0)
        loss_B = self._temperature.alpha().detach() * log_density_B - value_B
        stats = {"value": value_B.mean(), "entropy": -log_density_B.mean() / self._num_elements}
        if self.config.bc_alpha:
            mask_BH, noise = _imitated_BH(micro), self._noise(self._policy, micro, _IMITATION)
            imitation_B = self._policy.imitation_loss(micro.obs, Chunk(micro.actions_BHA), mask_BH, noise)
            has_B = (mask_BH.sum(-1) > 0).float()
            stats["imitation"] = (imitation_B.sum(), has_B.sum())
            loss_B = loss_B + self.config.bc_alpha * imitation_B
        return self._when_critics_know(loss_B, stats)

    def _temperature_loss(self, micro: Batch) -> LossOutput:
        with torch.no_grad():
            entropy_B = -self._log_density(self._policy.act(micro.obs, self._noise(self._policy, micro, _TEMPERATURE)))
        alpha = self._temperature.alpha()
        loss_B = alpha * (entropy_B - self.config.target_entropy * self._num_elements)
        return self._when_critics_know(loss_B, {"alpha": alpha})

    def _when_critics_know(self, loss_B: Tensor, stats: Any) -> LossOutput:
        """The mean of a loss, or one of no weight, which changes nothing."""
        weight = loss_B.new_tensor(float(len(loss_B)) * (self._num_steps >= self.config.critic_steps))
        return LossOutput(loss_B.sum() * (weight > 0), weight, loss_B.detach(), stats)

    def _log_density(self, chunk: Chunk) -> Tensor:
        """(B,): log pi of a chunk, of actions on the scale [-1, 1]."""
        assert chunk.log_prob_BT is not None
        scale = getattr(self._policy, "scale", None)
        unit = 0.0 if scale is None else self._policy.spec.horizon * scale.half_A.log().sum()
        return chunk.log_prob_BT.sum(1) + unit

    def _noise(self, module: Any, micro: Batch, stream: int) -> Any:
        return noise_of(module, micro, self.needs.batch_size, self.config.seed, self._step, stream)

    def _subset(self) -> Tensor:
        """The critics that judge what follows, of this update: the same ones in all micro-batches, on all ranks."""
        drawn = torch.randperm(
            self.config.num_critics, generator=generator(self.config.seed, self._step, _SUBSET + self._update)
        )
        return drawn[: self.config.num_targets]

    def _follow(self) -> None:
        """After each update of the critics."""
        self._target.follow()
        self._update += 1

    @property
    def _num_elements(self) -> int:
        return int(self._policy.spec.horizon * self._policy.spec.action_dim)


class Temperature(nn.Module):
    """alpha > 0, how much entropy is worth, as the exponential of one parameter."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))

    def alpha(self) -> Tensor:
        """A scalar, in float32."""
        return self.log_alpha.float().exp()


def _imitated_BH(batch: Batch) -> Tensor:
    """1 for the steps of each window that are imitated: those of a person, up to the first step of somebody else."""
    person_B = _is_of(batch.source_B, (Source.DEMO, Source.OPERATOR))
    return cut_at_takeover(batch).mask_BH.float() * person_B[:, None]


def _is_of(source: Tensor, sources: Iterable[Source]) -> Tensor:
    return torch.isin(source, torch.tensor([int(one) for one in sources], dtype=source.dtype, device=source.device))


def _adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def _advice(stats: Mapping[str, float]) -> str:
    if not stats["share_demo"]:
        return "no demonstration or correction yet: rewards that are rare are found by chance alone"
    if not stats["share_online"]:
        return "no step of the policy or an operator yet: it learns from demonstrations alone, and critics know no mistakes"
    return ""


def _require_density(policy: Any) -> None:
    if not policy.spec.density or policy.spec.replay:
        raise ConfigError(
            f"rlpd with a policy of family {getattr(policy, 'family', type(policy).__name__)!r}",
            rule="its policy has a density of the chunk itself, and draws that carry gradients",
            remedy="policy.family=squashed",
        )


def _check(config: RlpdConfig) -> None:
    rules = {
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "utd": (1 <= config.utd <= MAX_UTD, f"1 to {MAX_UTD}"),
        "demo_share": (0 <= config.demo_share <= 1, "0 to 1"),
        "num_critics": (config.num_critics >= 1, "at least 1"),
        "num_targets": (1 <= config.num_targets <= config.num_critics, f"1 to num_critics = {config.num_critics}"),
        "tau": (0 < config.tau <= 1, "above 0, at most 1"),
        "actor_q": (config.actor_q in ACTOR_Q, f"one of {', '.join(ACTOR_Q)}"),
        "temperature": (0 < config.temperature < math.inf, "above 0 and finite"),
        "target_entropy": (config.target_entropy < math.log(2), "below log 2, the largest of an element in [-1, 1]"),
        "bc_alpha": (0 <= config.bc_alpha < math.inf, "at least 0 and finite"),
        "critic_steps": (config.critic_steps >= 0, "at least 0"),
        "learning_rate": (config.learning_rate > 0, "above 0"),
        "critic_learning_rate": (config.critic_learning_rate > 0, "above 0"),
        "temperature_learning_rate": (config.temperature_learning_rate >= 0, "at least 0"),
        "ema_decay": (0 <= config.ema_decay < 1, "0 <= ema_decay < 1"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"rlpd with {name} = {getattr(config, name)!r}", rule=rule)
