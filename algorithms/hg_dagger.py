"""HG-DAgger in a fleet: imitate the demonstrations and what operators do when they take over.

    loss = E over demonstrations and operator steps of the policy's imitation loss         (HG-DAgger, arXiv 1810.02890)

The policy's own steps are never targets. As in SOP (arXiv 2601.03044) everything streams into one buffer, one policy serves
all tasks, and operator steps get a stated share of each batch (uniform replay lets whichever is larger drown the other):
one half (``mixture: fixed``), or the share that follows from the losses of both sides, by task (``adaptive``, SOP's; its
coefficient is not published, so the fixed half, within its clip range [0.2, 0.8], is the default).

Added: windows cut by an episode's end or a takeover's border are filled with their last valid action (``fill_ends``).

Left out of HG-DAgger: the doubt threshold learnt from an ensemble, because here an operator decides when to take over.
Left out of SOP: weights that change only between episodes (here they change between chunks).

Shape suffixes: B batch, H chunk length, A action dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part, noise_of
from algorithms.ema import Ema
from algorithms.policies.base import Chunk
from algorithms.windows import fill_with_last_action
from fleet.batch import Adaptive, BatchNeeds, Filter
from fleet.errors import ConfigError
from fleet.robot import Source


@dataclasses.dataclass
class HgDaggerConfig:
    start_learning_rate: float = 1e-3
    """AdamW's learning rate in the first ``start_steps``, on demonstrations alone or nearly so."""
    start_steps: int = 2000
    """Steps of the start."""
    learning_rate: float = 5e-4
    """Learning rate afterwards, while the data grows."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    batch_size: int = 256
    """B, windows a step."""
    operator_share: float = 0.5
    """Fraction of a batch from operator steps; the rest are demonstrations. Whoever has no data leaves it all to the other."""
    mixture: str = "fixed"
    """``fixed``: ``operator_share``. ``adaptive``: whichever side has the higher loss gets more, by task (SOP)."""
    adaptive_alpha: float = 1.5
    """SOP's coefficient of the loss on operator steps; above 1 it favours them."""
    ema_decay: float = 0.995
    """Of the average that acts; 0 publishes the newest weights."""
    max_staleness: int = 0
    """Releases by which the policy behind an operator's step may be older than the newest one; 0: no bound."""
    fill_ends: bool = True
    """Whether windows that an episode's end or a takeover's border cuts are filled with their last valid action."""
    seed: int = 0
    """Of whatever noise the policy's loss draws."""


class HgDagger:
    """Implements ``algorithms.base.Algorithm`` with one part, "policy"."""

    name = "hg_dagger"
    advice = ""
    Config = HgDaggerConfig

    def __init__(self, policy: Any, config: HgDaggerConfig, data: DataFacts = NO_FACTS) -> None:
        if not 0 < config.operator_share < 1 or not 0 <= config.ema_decay < 1 or config.batch_size < 1:
            raise ConfigError(
                f"hg_dagger has operator_share {config.operator_share}, ema_decay {config.ema_decay}, "
                f"batch_size {config.batch_size}",
                rule="0 < operator_share < 1, 0 <= ema_decay < 1, batch_size >= 1",
            )
        if config.max_staleness < 0:
            raise ConfigError(f"hg_dagger has max_staleness {config.max_staleness}", rule="max_staleness >= 0")
        if config.mixture not in ("fixed", "adaptive"):
            raise ConfigError(f"hg_dagger has mixture {config.mixture!r}", rule="mixture is fixed or adaptive")
        self.config, self._policy, self._step = config, policy, 0
        self._ema = Ema(policy, config.ema_decay)
        self._optimizer: torch.optim.Optimizer | None = None
        self.parts = {"policy": Part(policy, self._make_optimizer)}
        self.frozen: dict[str, nn.Module] = {}
        shares: dict[tuple[Source, ...], float] = {
            (Source.DEMO,): 1 - config.operator_share,
            (Source.OPERATOR,): config.operator_share,
        }
        sides = Adaptive(online=(Source.OPERATOR,), offline=(Source.DEMO,), alpha=config.adaptive_alpha)
        adaptive = sides if config.mixture == "adaptive" else None
        reads = tuple(policy.spec.reads)
        fresh = Filter(max_version_age=config.max_staleness or None)
        self.needs = BatchNeeds(config.batch_size, policy.spec.horizon, reads, shares, adaptive=adaptive, filter=fresh)

    def prepare(self, batch: Batch) -> Batch:
        return fill_with_last_action(batch) if self.config.fill_ends else batch

    def loss(self, part: str, micro: Batch) -> LossOutput:
        """The mean over all valid actions of the batch."""
        noise = noise_of(self._policy, micro, self.config.batch_size, self.config.seed, self._step)
        mask_BH = micro.mask_BH.float()
        loss_B = self._policy.imitation_loss(micro.obs, Chunk(micro.actions_BHA), mask_BH, noise)
        num_valid_B = mask_BH.sum(-1)
        stats: dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = {}
        for source in (Source.DEMO, Source.OPERATOR):
            weight_B = num_valid_B * (micro.source_B == source)
            stats[f"loss_{source.name.lower()}"] = ((loss_B * weight_B).sum(), weight_B.sum())
        return LossOutput((loss_B * num_valid_B).sum(), num_valid_B.sum(), loss_B.detach(), stats)

    def after_step(self, step: int, stats: Mapping[str, float]) -> None:
        """``step`` counts from 0."""
        self._ema.update(step)
        self._step = step + 1
        self._set_learning_rate()

    def acting(self) -> nn.Module:
        """The moving average."""
        return self._ema.module

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "ema": self._ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        self._ema.load_state_dict(state["ema"])
        self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        for group in self._optimizer.param_groups if self._optimizer else ():
            group["lr"] = self._learning_rate()

    def _learning_rate(self) -> float:
        in_start = self._step < self.config.start_steps
        return self.config.start_learning_rate if in_start else self.config.learning_rate

    def _make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        self._optimizer = torch.optim.AdamW(parameters, lr=self._learning_rate(), weight_decay=self.config.weight_decay)
        return self._optimizer
