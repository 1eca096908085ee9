"""RECAP: a policy that is told of each step whether it was better than expected (pi*0.6, arXiv 2511.14759).

    value    E -sum_v two_hot(R_t)_v log p(v | o_t, l)             R_t: steps to success, negative, in [-1, 0] (advantages.py)
    policy   E imitation loss of a_{t:t+H} given (o_t, l, I_t),    I_t = [A_t > eps_l], left out of 30 % of the rows
             A_t = r_t + ... + r_{t+N-1} + V(o_{t+N}) - V(o_t)     eps_l: so that 30 % of task l's steps are positive

Robots then act given "positive"; with guidance (``actor.guidance``) above 1 they exaggerate what it changes. What operators do
when they take over is always positive, and so are demonstrations unless ``demonstrations`` says "judged". Steps of which
nothing is known yet (the log ends within N steps, or nobody judged the episode) are trained on without the indicator.

In the first ``value_start_steps`` updates in which the value has something to learn from, nothing is judged: demonstrations and
operators are positive, the policy's own steps have no indicator. This is the paper's fine-tuning before its first iteration.

Added: the value is trained on as the data grows (``online_value``), and each step is judged by the value of now, or by one at
most ``relabel_every`` updates old. Thresholds follow the data by stochastic approximation. Windows are cut where somebody else
takes over, and filled with their last action where the episode ends (``fill_ends``).

Left out: the pre-training on other robots' data, the value's own vision-language model (it is a small network that reads what
the policy reads), subtasks in text, and the training of a language head beside the actions. Iterations that begin at the start
policy again are the learner's (``learner.restart_every``).

Shape suffixes: B batch, H chunk length, K tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.advantages import Labels, Thresholds, lookahead_advantage, normalised_return
from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part, generator, noise_of
from algorithms.ema import Ema
from algorithms.policies.base import ADVANTAGE, Chunk
from algorithms.recap_config import RecapConfig, check_recap, lengths
from algorithms.values import value_like
from algorithms.windows import cut_at_takeover, fill_with_last_action
from fleet.batch import BatchNeeds, Outcome, Within
from fleet.errors import ConfigError
from fleet.robot import Source

DROP_STREAM = 1  # of random numbers; the policy's noise is of stream 0
TARGET, JUDGEMENT, STALE = "recap.target", "recap.advantage", "recap.stale"  # what ``prepare`` adds to ``batch.replay``


class Recap:
    """Implements ``algorithms.base.Algorithm`` with the parts "value" and "policy".

    Raises:
        ConfigError: A setting is out of its range, or the policy does not take the condition "advantage".
    """

    name = "recap"
    Config = RecapConfig

    def __init__(self, policy: Any, config: RecapConfig, data: DataFacts = NO_FACTS) -> None:
        check_recap(config)
        if ADVANTAGE not in policy.spec.conditions:
            raise ConfigError(
                f"recap was given a policy of family {getattr(policy, 'family', type(policy).__name__)!r} that reads the "
                f"conditions {sorted(policy.spec.conditions)}",
                rule="the policy takes the condition 'advantage'",
                remedy="policy.family=flow (or token, small_vla) with policy.config.advantage=true",
            )
        self.config, self.advice = config, ""
        self._policy, self._step, self._value_updates = policy, 0, 0
        self._ema = Ema(policy, config.ema_decay)
        self._value = value_like(policy.spec, {**config.value, "low": -1.0, "high": 0.0})
        if data.statistics:
            self._value.set_statistics(data.statistics)
        self._tasks = data.tasks or ("",)
        self._length_K = lengths(config, data)
        self._thresholds = Thresholds(len(self._tasks), config.positive_share, config.threshold_window)
        self._labels = Labels(config.label_places, config.relabel_every) if config.relabel_every else None
        self._seen = dict.fromkeys(("success", "failure", "own"), False)
        self._clipped = 0.0
        self.parts = {
            "value": Part(self._value, lambda parameters: self._optimizer(parameters, config.value_learning_rate)),
            "policy": Part(policy, lambda parameters: self._optimizer(parameters, config.learning_rate)),
        }
        self.frozen: dict[str, nn.Module] = {}
        shares: dict[tuple[Source, ...], float] = {
            (Source.POLICY,): config.policy_share,
            (Source.OPERATOR,): config.operator_share,
            (Source.DEMO,): config.demo_share,
        }
        reads = tuple(sorted({*policy.spec.reads, *self._value.reader.reads}))
        offsets = (0, config.lookahead) if config.lookahead else (0,)
        self.needs = BatchNeeds(config.batch_size, policy.spec.horizon, reads, shares, offsets=offsets, within=Within.EPISODE)

    def prepare(self, batch: Batch) -> Batch:
        """Adds the value's target, the advantage (both NaN where not known) and the indicator, and cuts the windows."""
        task_B = self._task_of(batch)
        length_B = torch.tensor(self._length_K, dtype=torch.float32, device=task_B.device)[task_B]
        cost_B = length_B if not self.config.failure_cost else torch.full_like(length_B, self.config.failure_cost)
        return_B = normalised_return(batch, length_B, cost_B)
        advantage_B, stale_B = self._advantage(batch, return_B, length_B)
        replay = {**batch.replay, TARGET: return_B, JUDGEMENT: advantage_B, STALE: stale_B}
        obs = {**batch.obs, ADVANTAGE: self._indicator(batch, advantage_B)}
        batch = dataclasses.replace(batch, replay=replay, obs=obs)
        return cut_at_takeover(fill_with_last_action(batch) if self.config.fill_ends else batch)

    def loss(self, part: str, micro: Batch) -> LossOutput:
        """Of the value, the mean over rows whose episode was judged; of the policy, over all valid actions."""
        return self._value_loss(micro) if part == "value" else self._policy_loss(micro)

    def _value_loss(self, micro: Batch) -> LossOutput:
        return_B = micro.replay[TARGET]
        known_B = ~return_B.isnan()
        success_B, failure_B = (known_B & (micro.outcome_B == outcome) for outcome in (Outcome.SUCCESS, Outcome.FAILURE))
        rows = torch.ones_like(return_B).sum()
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "success": (success_B.sum(), rows),
            "failure": (failure_B.sum(), rows),
            "clipped": ((success_B & (return_B < -1)).sum(), success_B.sum()),
        }
        if not self._value_learns:
            return LossOutput(torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros_like(return_B), stats)
        loss_B = self._value.loss(micro.obs, torch.where(known_B, return_B, 0.0)) * known_B
        return LossOutput(loss_B.sum(), known_B.sum(), loss_B.detach(), stats)

    def _policy_loss(self, micro: Batch) -> LossOutput:
        noise = noise_of(self._policy, micro, self.config.batch_size, self.config.seed, self._step)
        mask_BH = micro.mask_BH.float()
        loss_B = self._policy.imitation_loss(micro.obs, Chunk(micro.actions_BHA), mask_BH, noise)
        num_valid_B, indicator_B = mask_BH.sum(-1), micro.obs[ADVANTAGE]
        advantage_B = micro.replay[JUDGEMENT]
        judged_B = ~self._forced(micro) & ~advantage_B.isnan()
        rows = torch.ones_like(advantage_B).sum()
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "own": ((micro.source_B == Source.POLICY).sum(), rows),
            "relabelled": (micro.replay[STALE].sum(), rows),
            "positive": ((indicator_B > 0).sum(), rows),
            "negative": ((indicator_B < 0).sum(), rows),
            **self._thresholds.stats(self._task_of(micro), advantage_B, judged_B),
        }
        return LossOutput((loss_B * num_valid_B).sum(), num_valid_B.sum(), loss_B.detach(), stats)

    def after_step(self, step: int, stats: Mapping[str, float]) -> None:
        """``step`` counts from 0."""
        self._ema.update(step)
        self._step = step + 1
        self._value_updates += stats["value.weight"] > 0
        policy = {name.removeprefix("policy."): value for name, value in stats.items() if name.startswith("policy.")}
        self._thresholds.update(policy, self.config.batch_size)
        for name, share in (("success", "value.success"), ("failure", "value.failure"), ("own", "policy.own")):
            self._seen[name] |= stats[share] > 0
        self._clipped += 0.01 * (stats["value.clipped"] - self._clipped)
        self.advice = self._advise()

    def acting(self) -> nn.Module:
        """The moving average of the policy. Whoever acts gives it the condition "positive"."""
        return self._ema.module

    def state_dict(self) -> dict[str, Any]:
        """Each rank has labels of its own; those of the first one are kept, and hold for whoever reads its shard."""
        return {
            "step": self._step,
            "value_updates": self._value_updates,
            "ema": self._ema.state_dict(),
            "tasks": {name: [self._length_K[k], *self._thresholds.state(k)] for k, name in enumerate(self._tasks)},
            "seen": dict(self._seen),
            "clipped": self._clipped,
            "labels": self._labels.state_dict() if self._labels else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Tasks that are new begin with the lengths of now and no threshold."""
        self._step, self._value_updates = int(state["step"]), int(state["value_updates"])
        self._ema.load_state_dict(state["ema"])
        for k, name in enumerate(self._tasks):
            if name in state["tasks"]:
                self._length_K[k], *threshold = state["tasks"][name]
                self._thresholds.load_state(k, threshold)
        self._seen, self._clipped = dict(state["seen"]), float(state["clipped"])
        if self._labels and state["labels"]:
            self._labels.load_state_dict(state["labels"])
        self.advice = self._advise()

    @property
    def _judges(self) -> bool:
        """Whether the value's start is over."""
        return self._value_updates >= self.config.value_start_steps

    @property
    def _value_learns(self) -> bool:
        return self.config.online_value or not self._judges

    def _task_of(self, batch: Batch) -> Tensor:
        """(B,): a run of which no tasks are known has one."""
        return batch.task_B if len(self._tasks) > 1 else torch.zeros_like(batch.task_B)

    def _forced(self, batch: Batch) -> Tensor:
        """(B,): rows that are positive whatever the value says."""
        demo_B, operator_B = batch.source_B == Source.DEMO, batch.source_B == Source.OPERATOR
        forced = self.config.demonstrations == "positive" or not self._judges
        return operator_B | (demo_B & forced)

    def _advantage(self, batch: Batch, return_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """A_t (B,), NaN where it is not known, and for which rows the value was asked."""
        if not self._judges:
            return torch.full_like(length_B, torch.nan), torch.zeros_like(return_B, dtype=torch.bool)
        lookahead, table = self.config.lookahead, self._labels
        if table is None:
            advantage_B, stale_B = length_B, torch.ones_like(return_B, dtype=torch.bool)
        else:
            advantage_B, fresh_B = table.look_up(batch, self._value_updates)
            stale_B = ~fresh_B
        rows_N = torch.nonzero(stale_B)[:, 0]
        if not len(rows_N):  # an engine that shards the value needs all ranks to ask it equally often
            rows_N = torch.zeros_like(batch.step_B[:1])
        some = _rows(batch, rows_N)
        later = some.obs_at[lookahead] if lookahead else {name: value[:0] for name, value in some.obs.items()}
        value_M = self._value({name: torch.cat([some.obs[name], later[name]]) for name in later})
        now_N = value_M[: len(rows_N)]
        later_N = value_M[len(rows_N) :] if lookahead else now_N
        advantage_N = lookahead_advantage(some, now_N, later_N, return_B[rows_N], length_B[rows_N], lookahead)
        if table is not None:
            table.put(some, advantage_N, self._value_updates)
        return advantage_B.index_copy(0, rows_N, advantage_N), stale_B

    def _indicator(self, batch: Batch, advantage_B: Tensor) -> Tensor:
        """(B,) float32: 1 positive, -1 negative, 0 not known or dropped."""
        forced_B = self._forced(batch)
        positive_B = forced_B | (advantage_B > self._thresholds.of(self._task_of(batch)))
        known_B = forced_B | ~advantage_B.isnan()
        draw_B = torch.rand(self.config.batch_size, generator=generator(self.config.seed, self._step, DROP_STREAM))
        kept_B = (draw_B >= self.config.indicator_dropout).to(batch.index_B.device)[batch.index_B]
        return torch.where(positive_B, 1.0, -1.0) * (known_B & kept_B)

    def _advise(self) -> str:
        seen = self._seen
        if not seen["success"] and not seen["failure"]:
            return "no finished episode was judged yet: the value learns nothing, and the policy clones what it is given"
        if not seen["success"]:
            return "no successful episode yet: the value tells no step from another; give demonstrations"
        if not seen["own"]:
            return "no step of the policy yet: all that there is counts as positive; let robots act"
        if not seen["failure"]:
            return "no failed episode yet: advantages tell faster steps from slower ones, and nothing from failure"
        if self._clipped > 0.1:
            return (
                f"{self._clipped:.0%} of the steps of successful episodes are further from the end than episode_steps, or than "
                "the longest episode when the run began, and count as failures: set episode_steps to the time limit"
            )
        return ""

    def _optimizer(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=self.config.weight_decay)


def _rows(batch: Batch, rows_N: Tensor) -> Batch:
    """What judges steps, of some rows."""

    def cut(value: Any) -> Any:
        return value[rows_N] if isinstance(value, Tensor) else {key: cut(inner) for key, inner in value.items()}

    names = ("obs", "obs_at", "inside_at", "actions_BHA", "step_B", "frame_B", "outcome_B", "steps_to_go_B")
    return dataclasses.replace(batch, **{name: cut(getattr(batch, name)) for name in names})
