"""Behaviour cloning: what the start policy is trained with, and the control that other algorithms are compared with.

    loss = sum_b n_b l_b / sum_b n_b        over windows b of the sources that are named, demonstrations if nothing is said

l_b: the policy's imitation loss of a window, averaged over its n_b valid actions. A window ends where somebody else takes
over. All labels count alike, whatever became of the episode: with ``sources: [demo, operator, policy]`` this is the plain
cloning of all that a fleet recorded.

Left out: nothing of the method.

Added: windows cut by an episode's end or a takeover's border are filled with their last valid action (``fill_ends``).

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
from fleet.batch import BatchNeeds
from fleet.errors import ConfigError
from fleet.robot import SOURCE_NAMES, Source


@dataclasses.dataclass
class BcConfig:
    learning_rate: float = 1e-3
    """AdamW's."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    batch_size: int = 256
    """B, windows a step."""
    sources: list[str] = dataclasses.field(default_factory=lambda: ["demo"])
    """Whose steps are cloned: some of demo, operator, policy, script."""
    shares: list[float] = dataclasses.field(default_factory=list)
    """Fraction of a batch from each of ``sources``, in their order; who has no data leaves it to the others. Empty: by size,
    in each task every step is drawn alike."""
    ema_decay: float = 0.995
    """Of the average that acts; 0 publishes the newest weights."""
    fill_ends: bool = True
    """Whether windows that an episode's end or a takeover's border cuts are filled with their last valid action."""
    seed: int = 0
    """Of whatever noise the policy's loss draws."""


class Bc:
    """Implements ``algorithms.base.Algorithm`` with one part, "policy"."""

    name = "bc"
    advice = ""
    Config = BcConfig

    def __init__(self, policy: Any, config: BcConfig, data: DataFacts = NO_FACTS) -> None:
        if not 0 <= config.ema_decay < 1 or config.batch_size < 1:
            raise ConfigError(
                f"bc has ema_decay {config.ema_decay}, batch_size {config.batch_size}",
                rule="0 <= ema_decay < 1, batch_size >= 1",
            )
        shares = _shares(config.sources, config.shares)
        self.config, self._policy, self._step = config, policy, 0
        self._ema = Ema(policy, config.ema_decay)
        self.parts = {"policy": Part(policy, self._make_optimizer)}
        self.frozen: dict[str, nn.Module] = {}
        self.needs = BatchNeeds(config.batch_size, policy.spec.horizon, tuple(policy.spec.reads), shares)

    def prepare(self, batch: Batch) -> Batch:
        return fill_with_last_action(batch) if self.config.fill_ends else batch

    def loss(self, part: str, micro: Batch) -> LossOutput:
        """The mean over all valid actions of the batch."""
        noise = noise_of(self._policy, micro, self.config.batch_size, self.config.seed, self._step)
        mask_BH = micro.mask_BH.float()
        loss_B = self._policy.imitation_loss(micro.obs, Chunk(micro.actions_BHA), mask_BH, noise)
        num_valid_B = mask_BH.sum(-1)
        return LossOutput((loss_B * num_valid_B).sum(), num_valid_B.sum(), loss_B.detach(), {})

    def after_step(self, step: int, stats: Mapping[str, float]) -> None:
        """``step`` counts from 0."""
        self._ema.update(step)
        self._step = step + 1

    def acting(self) -> nn.Module:
        """The moving average."""
        return self._ema.module

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "ema": self._ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        self._ema.load_state_dict(state["ema"])

    def _make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)


def _shares(names: list[str], shares: list[float]) -> dict[tuple[Source, ...], float]:
    """By group of sources.

    Raises:
        ConfigError: A name is unknown or named twice, or shares are not one for each.
    """
    if not names or len(set(names)) < len(names) or not set(names) <= set(SOURCE_NAMES):
        raise ConfigError(f"bc has sources {names}", rule=f"some of {', '.join(SOURCE_NAMES)}, once each")
    sources = [Source(SOURCE_NAMES.index(name)) for name in names]
    if not shares:
        return {tuple(sources): 1.0}
    if len(shares) != len(sources) or not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"bc has shares {shares} of sources {names}", rule="one for each, above 0, that sum up to 1")
    return {(source,): share for source, share in zip(sources, shares, strict=True)}
